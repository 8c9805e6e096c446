"""Advantages of single papers. δ = log q(y) − log p(y) at the sampled action, A the group-relative reward.

Shape legend: n steps of a chunk, N of a micro-batch, B trajectories of T steps.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import softplus

from ..objective.advantage import LOG_PROBS, GroupRelative, log_ratio
from ..objective.signal import Scope
from ..objective.steps import Steps


class RewardMinusPMI(GroupRelative):
    """Advantage A − λ·½(softplus(δ) − log 2) (AntiSD, 2605.11609).

    δ is what the teacher's context says of the token (their pointwise mutual information): what that context makes
    likelier is pushed down, which ascends the JSD of the two. The shape is at least −½·log 2, where δ ≪ 0, and grows
    like δ/2.

    Args:
        share: λ, default 0.5 (AntiSD). At 0 no teacher is asked.
        scale: as in `GroupRelative`.
    """

    scope: Scope = "step"

    def __init__(self, share: float = 0.5, scale: bool = True) -> None:
        super().__init__(scale)
        if share < 0:
            raise ValueError(f"advantage.share must be >= 0, got {share}")
        self.share = share

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return GroupRelative.needs | ({"teacher"} if self.share else frozenset())

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return LOG_PROBS if self.share else frozenset()

    def __call__(self, steps: Steps) -> Tensor:
        advantage = super().__call__(steps)
        if not self.share:
            return advantage
        return advantage - self.share * (softplus(log_ratio(steps)) - math.log(2)) / 2
