"""AdaptiveWindow: how far rollouts go, decided by probes of the gradient."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ...module import OnPolicyDistillation
from ...optimizer_step import OptimizerStep
from ...rollout_settings import derived_seed
from ...sharding import refuse_sharded
from ...trajectory import Trajectories
from .rule import HORIZON, StopRule

PROBE_DRAWS = 2**34  # keeps the probe's seeds apart from those of rollouts, evaluation and the agreement


class AdaptiveWindow(StopRule):
    """A window that a probe widens or narrows, after the idea of ADWIN (2605.28396).

    Every so often some prompts are rolled out in full, and the gradient of their first ``horizon`` steps is compared
    with that of all of them. Where they don't point the same way, the window grows by a factor; where a window smaller
    by that factor does as well, it shrinks to that. The window is one number for all trajectories. The paper's update
    rule, its threshold and its staleness control are not public: this rule is ours.

    A probe costs two gradients in memory, and a full rollout with three training passes at most in time.

    Args:
        smallest: of the window, and its start.
        every: optimizer steps between probes. Default 10.
        probe: trajectories of a probe, at most one optimizer step's, on each rank. Default 64 (the paper's).
        agreement: cosine from which on the directions count as one. Default 0.9.
        factor: by which the window grows and shrinks. Default 2.

    Raises:
        ValueError: a value out of range; when training begins, a strategy that shards the student.
    """

    knobs = (HORIZON,)
    remembers = ("horizon",)

    def __init__(
        self, smallest: int = 16, every: int = 10, probe: int = 64, agreement: float = 0.9, factor: float = 2.0
    ) -> None:
        if min(smallest, every, probe) < 1 or not -1 <= agreement <= 1 or factor <= 1:
            raise ValueError(
                f"AdaptiveWindow: smallest={smallest}, every={every} and probe={probe} must be >= 1, "
                f"agreement={agreement} in [-1, 1] and factor={factor} > 1"
            )
        self.smallest, self.every, self.probe = smallest, every, probe
        self.agreement, self.factor = agreement, factor

    def begin(self, module: OnPolicyDistillation, longest: int) -> None:
        refuse_sharded(module.trainer, "AdaptiveWindow", "whose gradients can't be compared then")
        self.longest = longest
        self.horizon = min(self.horizon or self.smallest, longest)

    def observe(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        assert self.horizon is not None
        if module.global_step % self.every:
            return
        examples = [example for trained in step.trajectories for example in trained.examples][: self.probe]
        group = torch.cat([trained.group for trained in step.trajectories])[: self.probe].cpu()
        seeds = [derived_seed(PROBE_DRAWS, module.global_step, module.global_rank, i) for i in range(len(examples))]
        rollout = dataclasses.replace(module.rollout, horizon=self.longest)
        rolled = module.act("student", examples, seeds, rollout).to("cpu")
        full = module.actor.with_rewards(dataclasses.replace(rolled, group=group))
        direction = gradient_of(module, full)
        agreement = cosine(gradient_of(module, full.truncate(self.horizon)), direction)
        module.record("early_stop/agreement", agreement)
        smaller = max(self.smallest, int(self.horizon / self.factor))
        if agreement < self.agreement:
            self.horizon = min(self.longest, math.ceil(self.horizon * self.factor))
        elif cosine(gradient_of(module, full.truncate(smaller)), direction) >= self.agreement:
            self.horizon = smaller


def gradient_of(module: OnPolicyDistillation, trajectories: Trajectories) -> list[Tensor]:
    """Computes the gradient that training on these trajectories has, over all ranks, for each trained parameter.

    Neither ``.grad`` nor what is logged changes. Every rank must call it, between optimizer steps.
    """
    reader = module.reader
    step = OptimizerStep(list(reader.settle(trajectories).split(reader.size)))
    reader.prepare(step)
    parameters = [p for p in module.student.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) for p in parameters]
    for batch in step:
        with torch.enable_grad(), module.trainer.precision_plugin.forward_context():
            streams, student = reader.query(batch), module.streams.student(batch.trajectories)
            loss, _ = module.objective(student, streams, batch.trajectories, step.normalizers)
            # not `backward`, which would add to the gradients of the run
            shares = torch.autograd.grad(loss, parameters, allow_unused=True)
        for gradient, share in zip(gradients, shares, strict=True):
            if share is not None:
                gradient += share
    return [module.ranks.sum(gradient) for gradient in gradients]


def cosine(left: list[Tensor], right: list[Tensor]) -> float:
    """Compares the directions of two gradients.

    It is 1 where one of them is zero, since then there is nothing to disagree about.
    """

    def dot(a: list[Tensor], b: list[Tensor]) -> float:
        return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))

    size = math.sqrt(dot(left, left) * dot(right, right))
    return dot(left, right) / size if size else 1.0
