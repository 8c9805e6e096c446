"""Signals of single papers. Shape legend: n steps of a chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objective.signal import Signal
from ..objective.steps import OpenSteps


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
