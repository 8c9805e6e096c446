"""A student, teachers, and grouped rollouts with rewards, on which parts are compared with their formulas.

Shape legend: B trajectories, T steps, N trained steps, V ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd_lightning.actor import group_statistics
from opd_lightning.distribution import Aligned, Categorical, Distribution, Stream
from opd_lightning.objective import (
    Advantage,
    Entropy,
    LogRatio,
    Objective,
    Part,
    PolicyGradient,
    ReverseKL,
    Signal,
    Term,
    Weight,
)
from tests.objective.reference import Policy, batch

V = 6
MASK = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 1], [1, 1, 0, 1]]
SHAPE = len(MASK), len(MASK[0])
GROUP = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
REWARD = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
"""Two mixed groups, of three, and a pair that is right."""


class World:
    """Policies by name, ``student`` among them, and rollouts that the student made, or (``stale``) made before.

    With ``aligned`` W the teacher has another tokenizer, of W ids.
    """

    def __init__(self, seed: int = 0, names: Sequence[str] = ("teacher",), stale: bool = False, **changes: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.student = Policy.random(generator, SHAPE, V)
        self.aligned: int | None = changes.pop("aligned", None)
        self.teachers = {name: Policy.random(generator, SHAPE, self.aligned or V) for name in names}
        self.paired = torch.rand(SHAPE, generator=generator) < 0.7
        self.rest = torch.where(self.paired[..., None], -torch.rand(*SHAPE, 2, generator=generator), torch.nan)
        self.matched = torch.tensor([[0, 2, 3], [1, 2, 0]])
        reward = changes.pop("reward", REWARD)
        mean, std = group_statistics(reward, GROUP)
        facts = {"group": GROUP, "reward": reward, "group_mean": mean, "group_std": std}
        spans = (torch.arange(SHAPE[0] * SHAPE[1]).view(SHAPE) % 3 == 0).float()
        facts["channels"] = {"spans": spans, "turn": torch.arange(SHAPE[1]).expand(SHAPE) // 2}
        facts["channels"]["reward"] = torch.randint(-2, 3, SHAPE, generator=generator) / 2 * torch.tensor(MASK)
        facts["channels"]["author"] = (torch.arange(SHAPE[1]) < torch.arange(SHAPE[0])[:, None] % 3).float()
        facts["channels"] |= {name: torch.rand(SHAPE, generator=generator) for name in ("sureness", "audit")}
        facts["channels"]["audit"][:, 1:3] = 0.0
        self.trajectories = replace(batch(MASK, V, seed), seed=torch.arange(SHAPE[0]), **facts | changes)
        if not stale:
            self.trajectories.behavior_log_probs = self.log_prob(self.student).detach()

    @property
    def mask(self) -> Tensor:
        return self.trajectories.mask

    def log_probs(self, policy: Policy) -> Tensor:
        """``[B, T, V]``"""
        return policy.logits(torch.ones(SHAPE, dtype=torch.bool)).log_softmax(-1).view(*SHAPE, V)

    def log_prob(self, policy: Policy) -> Tensor:
        """``[B, T]`` of the actions."""
        return self.log_probs(policy).gather(-1, self.trajectories.actions[..., None])[..., 0]

    def entropy(self, policy: Policy) -> Tensor:
        """``[B, T]``"""
        log_probs = self.log_probs(policy).detach()
        return -(log_probs.exp() * log_probs).sum(-1)

    @property
    def delta(self) -> Tensor:
        """``[B, T]``"""
        return (self.log_prob(self.teachers["teacher"]) - self.log_prob(self.student)).detach()

    @property
    def group_relative(self) -> Tensor:
        """``[B, T]`` by a loop over the groups."""
        advantage = torch.zeros(SHAPE, dtype=torch.float64)
        for group in GROUP.unique():
            of_group = group == GROUP
            rewards = self.trajectories.reward[of_group].double()
            centered = (rewards - rewards.mean()) / (rewards.var(unbiased=False).sqrt() + 1e-6)
            advantage[of_group] = centered[:, None].expand(-1, SHAPE[1])
        return advantage

    def loss(self, *terms: Term, chunk_steps: int | None = 3, rows: Tensor | None = None) -> Tensor:
        """Of the batch, or of some of its rows alone."""
        rows = torch.arange(SHAPE[0]) if rows is None else rows
        student, streams = self.queried(rows)
        return Objective(list(terms), chunk_steps=chunk_steps)(student, streams, self.trajectories.select(rows))[0]

    def queried(self, rows: Tensor) -> tuple[Categorical, dict[str, Stream]]:
        student = self.student.distribution
        streams = {name: policy.teacher for name, policy in self.teachers.items()}

        def some(policy: Categorical) -> Categorical:
            hidden = policy.hidden[rows]
            return Categorical(hidden, policy.head, {1: hidden.square(), 2: hidden, -1: hidden})

        def told(own: Categorical) -> Distribution:
            if self.aligned is None:
                return own
            told, actions = self.trajectories.behavior_log_probs[rows], self.trajectories.actions[rows]
            return Aligned(told, actions, V, None, None, own, self.paired[rows], self.rest[rows], self.matched)

        return some(student), {name: Stream(told(some(teacher))) for name, teacher in streams.items()}

    def values(self, part: Part) -> Tensor:
        """``[B, T]`` of a weight or an advantage, as the loss has them; NaN where nothing is trained."""
        rows = torch.arange(SHAPE[0])
        student, streams = self.queried(rows)
        seen: list[tuple[Tensor, Tensor]] = []

        class Probe(Signal):
            needs = part.needs | {"teacher"}

            @property
            def inputs(self) -> dict[str, Part]:
                return {"part": part}

            def __call__(self, steps: Any) -> Tensor:
                seen.append((steps.index, steps.inputs["part"]))
                return steps.student.log_prob(steps.action)

        with torch.no_grad():
            Objective([Term(Probe())], chunk_steps=3)(student, streams, self.trajectories)
        values = torch.full(SHAPE, torch.nan, dtype=torch.float64)
        for index, value in seen:
            values.view(-1)[index] = value.double()
        return values

    def expected(self, advantage: Tensor) -> list[Tensor]:
        """Gradients of −mean of advantage · log p over the trained steps."""
        return self.student.gradients(-(advantage * self.log_prob(self.student))[self.mask].sum() / self.mask.sum())

    def gradients(self, *terms: Term, **options: Any) -> list[Tensor]:
        return self.student.gradients(self.loss(*terms, **options))


def term_of(part: Part) -> Term:
    """The plainest term that a part has a place in."""
    if isinstance(part, Advantage):
        return Term(PolicyGradient(part))
    if isinstance(part, Weight):
        return Term(ReverseKL(), weights=[part])
    assert isinstance(part, Signal)
    return Term(part)


def defaults(cls: type) -> Any:
    """Builds a part from its defaults; what has none is filled in by its kind."""
    fillings = {"Advantage": LogRatio, "Weight": Entropy, "list[int]": lambda: [0, 2]}
    missing = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
    return cls(**{parameter.name: fillings[parameter.annotation]() for parameter in missing})
