"""Signals of single papers. Shape legend: n steps of a chunk, K ids of the support, V of the vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..objective.divergence import FULL, JSD, Divergence, jsd_terms
from ..objective.signal import Signal
from ..objective.steps import OpenSteps
from ..objective.support import Support


class Unlikelihood(Signal):
    """Unlikelihood −log(1 − p(y)) where p(y) > margin, 0 elsewhere: a step is unlearned (SPEAR, 2605.07977).

    Args:
        margin: default 0.3 (SPEAR; its code's default is 0.1).

    Raises:
        ValueError: a margin that is not in [0, 1).
    """

    needs = frozenset({"categorical"})

    def __init__(self, margin: float = 0.3) -> None:
        if not 0 <= margin < 1:
            raise ValueError(f"signal.margin must be in [0, 1), got {margin}")
        self.margin = margin

    def __call__(self, steps: OpenSteps) -> Tensor:
        # a certain step would have an infinite loss and gradient
        p = steps.student.log_prob(steps.action).exp().clamp(max=1 - 1e-6)
        return torch.where(p > self.margin, -torch.log1p(-p), 0.0)


class BoundedJSD(JSD):
    """JSD whose teacher stays within [low, high] times the student, id by id (RESD, 2605.12741).

    log q is brought between log p + log low and log p + log high, p without gradient, on the support with its tail, and
    is not normalized again, as in RESD's code: what the teacher rules out pushes no harder than the bound.

    Args:
        low: ε_min, default 0.2 (RESD). 0: no bound.
        high: ε_max. None (default, RESD): no bound; RESD takes 5 on one task.
        beta: as in `JSD`. Default 1, the reverse KL (RESD's code).
        support, temperature, clip: as in every divergence.

    Raises:
        ValueError: bounds that do not hold an equal teacher: 0 <= low <= 1 <= high.
    """

    def __init__(
        self,
        low: float = 0.2,
        high: float | None = None,
        beta: float = 1.0,
        support: Support = FULL,
        temperature: float = 1.0,
        clip: float | None = None,
    ) -> None:
        super().__init__(beta, support, temperature, clip)
        if not 0 <= low <= 1 or (high is not None and high < 1):
            raise ValueError(f"signal: need 0 <= low <= 1 <= high, got {low} and {high}")
        self.low, self.high = low, high

    def categorical(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        known = log_p.detach()
        if self.low:
            log_q = torch.maximum(log_q, known + math.log(self.low))
        if self.high is not None:
            log_q = torch.minimum(log_q, known + math.log(self.high))
        return jsd_terms(log_p, log_q, self.beta)

    def with_gradient(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        # the written gradient of the JSD knows no bounds
        return Divergence.with_gradient(self, log_p, log_q, p, q)


class Contrast(Signal):
    """Hinge max(0, m + |log p(y) − log q(y)| − |log p(y) − log q₋(y)|): nearer to the teacher than to a wrong one.

    UniSD (2605.06597); 0 where the other one's view shows nothing.

    Args:
        other: the entry of ``model.teachers`` that is shown what is wrong, whose q₋.
        margin: m in nats, default 0.5 (UniSD).

    Raises:
        ValueError: a margin below 0.
    """

    needs = frozenset({"teacher", "categorical"})

    def __init__(self, other: str = "wrong", margin: float = 0.5) -> None:
        if margin < 0:
            raise ValueError(f"signal.margin must be >= 0, got {margin}")
        self.other, self.margin = other, margin
        self.reads = frozenset({"teacher/log_prob", f"{other}/log_prob"})

    def __call__(self, steps: OpenSteps) -> Tensor:
        log_prob = steps.student.log_prob(steps.action)
        right, wrong = ((log_prob - steps.statistic(f"{name}/log_prob")).abs() for name in ("teacher", self.other))
        return (self.margin + right - wrong).clamp(min=0).where(steps.knows(self.other), 0.0)
