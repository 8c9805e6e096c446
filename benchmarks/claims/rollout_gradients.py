"""Gradients of single rollouts of the quickstart's student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from opd_lightning.modalities.text.quickstart import sums
from opd_lightning.objective import ReverseKL, Signal, Term
from opd_lightning.trajectory import Trajectories

from .runs import make


def acted(module: Any, prompts: int, seed: int, group_size: int = 1) -> Trajectories:
    """Lets the student of a loaded module act on new problems; a group's rollouts stand side by side."""
    rows = [row for row in sums(prompts, seed=100 + seed) for _ in range(group_size)]
    return module.act("student", rows, [1000 * seed + i for i in range(len(rows))], module.rollout)


def gradient(module: Any, signal: Signal, rollout: Trajectories) -> Tensor:
    """Returns the gradient ``[parameters]`` of one rollout's mean loss over its steps."""
    module.objective.terms[0].signal = signal
    teacher = {"teacher": module.streams.query("teacher", rollout)}
    loss = module.objective(module.streams.student(rollout), teacher, rollout).loss
    parameters = [p for p in module.policies["student"].model.parameters() if p.requires_grad]
    return torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, parameters)])


def rollout_gradients(signals: Mapping[str, Signal], seed: int, count: int = 96) -> dict[str, Tensor]:
    """Returns the gradients ``[count, parameters]`` of as many rollouts by signal."""
    module: Any = make([Term(ReverseKL())])
    module.configure_model()
    batch = acted(module, count, seed)
    rollouts = [batch.select(torch.tensor([i])) for i in range(count)]
    return {name: torch.stack([gradient(module, signal, one) for one in rollouts]) for name, signal in signals.items()}
