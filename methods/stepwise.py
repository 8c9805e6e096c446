"""Stepwise distillation: a teacher's log-ratio that counts less in turns in which the student is far from it.

Shape legend: N steps of a micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..objective.advantage import GroupRelative, log_probs, log_ratio
from ..objective.signal import Scope
from ..objective.steps import Steps

EPSILON = 1e-6
"""Added to both distances before they are divided (SOD's code)."""


class StepwiseSum(GroupRelative):
    """Advantage A + c·w_k·δ: a turn counts less the farther the student is from the teacher in it (SOD, 2605.07725).

    δ = log q(y) − log b(y), where b is the student that acted. w_k = min((d_1 + ε)/(d_k + ε), 1 + cap) in turn k, and
    d_k is the mean |δ| of what was written in that turn; the first turn that was written has w = 1. A rollout of one
    turn has A + c·δ.

    Args:
        coefficient: c, default 1 (SOD). At 0 no teacher is asked.
        cap: by how much a turn that is nearer than the first may count more. Default 0.2 (SOD's script; its
            configuration has 0.5).
        scale: as in `GroupRelative`.

    Raises:
        ValueError: a cap below 0.
    """

    scope: Scope = "row"

    def __init__(self, coefficient: float = 1.0, cap: float = 0.2, scale: bool = True) -> None:
        super().__init__(scale)
        if cap < 0:
            raise ValueError(f"advantage.cap must be >= 0, got {cap}")
        self.coefficient, self.cap = coefficient, cap

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return GroupRelative.needs | (frozenset({"turn", "teacher", "behavior"}) if self.coefficient else frozenset())

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return log_probs("behavior") if self.coefficient else frozenset()

    def __call__(self, steps: Steps) -> Tensor:
        advantage = super().__call__(steps)
        if not self.coefficient:
            return advantage
        ratio = log_ratio(steps, "behavior")
        return advantage + self.coefficient * self.weight(steps, ratio.abs()) * ratio

    def weight(self, steps: Steps, distance: Tensor) -> Tensor:
        """Returns w ``[N]``; ``distance``: |δ| of each step."""
        # the turns of all trajectories, sorted by trajectory and then by number
        places = torch.stack([steps.trajectory, steps.channel("turn").long()])
        turns, turn = places.unique(dim=1, return_inverse=True)
        mean = distance.new_zeros(turns.shape[1]).index_add(0, turn, distance) / turn.bincount()
        row = turns[0].contiguous()
        first = torch.searchsorted(row, row)
        return ((mean[first] + EPSILON) / (mean + EPSILON)).clamp(max=1 + self.cap)[turn]
