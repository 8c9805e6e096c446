"""Tabular softmax policies: logits of their own at every state, on which the project's objective is evaluated exactly.

A rollout takes T steps among V ids; its state is the step and the id before it, so that there are T·(V + 1) states.
Everything is float64.

Shape legend: B rollouts, T steps, V ids, S states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opd_lightning import Trajectories
from opd_lightning.distribution import Categorical, Head, Stream
from opd_lightning.objective import Objective, Term


def random_logits(states: int, ids: int, seed: int, scale: float = 1.0) -> Tensor:
    """Draws the logits ``[S, V]`` of a policy."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(states, ids, generator=generator, dtype=torch.float64)


def rollouts(steps: int, ids: int) -> Tensor:
    """Lists all V^T rollouts ``[B, T]``."""
    return torch.cartesian_prod(*[torch.arange(ids)] * steps).view(-1, steps)


def states_of(actions: Tensor, ids: int) -> Tensor:
    """Returns the states ``[B, T]`` that rollouts visit."""
    before = nn.functional.pad(actions[:, :-1] + 1, (1, 0))
    return torch.arange(actions.shape[1]) * (ids + 1) + before


def log_prob(logits: Tensor, actions: Tensor, states: Tensor) -> Tensor:
    """Returns the log-probs ``[B, T]`` of actions."""
    return logits.log_softmax(-1)[states].gather(-1, actions[..., None])[..., 0]


def distribution(logits: Tensor) -> Categorical:
    """Wraps logits ``[B, T, V]`` as they are."""
    ids = logits.shape[-1]
    head = nn.Linear(ids, ids, bias=False, dtype=torch.float64).requires_grad_(False)
    nn.init.eye_(head.weight)
    return Categorical(logits, Head(head, ids))


def trajectories(actions: Tensor, log_probs: Tensor, mask: Tensor | None = None, **facts: Any) -> Trajectories:
    """Makes a batch of rollouts; all of their steps are trained unless a mask ``[B, T]`` says which."""
    mask = torch.ones_like(actions, dtype=torch.bool) if mask is None else mask
    return Trajectories({}, actions, mask, [{} for _ in actions], mask.any(1), log_probs, **facts)


def loss(
    terms: Sequence[Term], student: Tensor, teachers: dict[str, Tensor], actions: Tensor, states: Tensor, **facts: Any
) -> Tensor:
    """Evaluates an objective on rollouts of the student.

    Args:
        terms: of the objective.
        student: logits ``[S, V]``, with gradient.
        teachers: logits ``[S, V]`` by name.
        actions, states: ``[B, T]``.
        facts: further fields of `Trajectories`.
    """
    batch = trajectories(actions, log_prob(student.detach(), actions, states), **facts)
    streams = {name: Stream(distribution(logits[states])) for name, logits in teachers.items()}
    return Objective(list(terms))(distribution(student[states]), streams, batch).loss


def gradients(term: Term, student: Tensor, teachers: dict[str, Tensor], actions: Tensor, states: Tensor) -> Tensor:
    """Returns the gradient of each rollout's mean loss over its steps, ``[B, S·V]``."""
    leaf = student[states].detach().requires_grad_()
    batch = trajectories(actions, log_prob(student, actions, states))
    streams = {name: Stream(distribution(logits[states])) for name, logits in teachers.items()}
    value = Objective([term])(distribution(leaf), streams, batch).loss
    # Z counts the steps of all rollouts
    (slope,) = torch.autograd.grad(value * len(actions), leaf)
    table = torch.zeros(len(actions), *student.shape, dtype=torch.float64)
    table[torch.arange(len(actions))[:, None], states] = slope.double()
    return table.flatten(1)


def moments(values: Tensor, probabilities: Tensor) -> tuple[Tensor, float]:
    """Returns the mean ``[K]`` of values ``[B, K]``, and their total variance."""
    mean = probabilities @ values
    return mean, float(probabilities @ (values - mean).square().sum(1))
