"""Advantages of single papers over the turns of an episode. δ = log q(y) − log p(y) at the sampled action.

Shape legend: n steps of a chunk, N of a micro-batch, B trajectories.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..objective.advantage import LOG_PROBS, Advantage, GroupRelative, log_ratio, turn_rewards
from ..objective.signal import Scope
from ..objective.steps import Steps


class CoupledReward(Advantage):
    """Advantage R_k + λ·clip(δ, ±c): the reward of the step's turn, and what a teacher adds (CoARS, 2604.10029).

    Args:
        coefficient: λ, default 0.1 (CoARS). At 0 no teacher is asked: REINFORCE by turns.
        clip: c, default 1 (CoARS).

    Raises:
        ValueError: a coefficient below 0, or a clip that is not positive.
    """

    def __init__(self, coefficient: float = 0.1, clip: float = 1.0) -> None:
        if coefficient < 0 or clip <= 0:
            raise ValueError(f"advantage: coefficient must be >= 0 and clip > 0, got {coefficient} and {clip}")
        self.coefficient, self.clip = coefficient, clip

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"turn", "turn_reward"} | ({"teacher"} if self.coefficient else set()))

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return LOG_PROBS if self.coefficient else frozenset()

    def __call__(self, steps: Steps) -> Tensor:
        reward = turn_rewards(steps.trajectories)[steps.trajectory, steps.channel("turn")]
        if not self.coefficient:
            return reward
        return reward + self.coefficient * log_ratio(steps).clamp(-self.clip, self.clip)


class ShiftCredit(GroupRelative):
    """Advantage A·z·m·exp(τ·z) of a turn that shifted a partner's mind by Δ (SI-AVPO, 2605.22240).

    z = sign(A·Δ) and m = |Δ| / max |Δ| over the trajectory's turns; A where Δ is 0. So a turn that went against how the
    episode ended gets a damped credit of the other sign. Δ is the environment's reward of the turn.

    Args:
        tau: τ, default 0.5 (ours: SI-AVPO's was not found).
        scale: as in `GroupRelative`.

    Raises:
        ValueError: τ below 0.
    """

    needs = GroupRelative.needs | {"turn", "turn_reward"}
    scope: Scope = "data"

    def __init__(self, tau: float = 0.5, scale: bool = True) -> None:
        super().__init__(scale)
        if tau < 0:
            raise ValueError(f"advantage.tau must be >= 0, got {tau}")
        self.tau = tau

    def __call__(self, steps: Steps) -> Tensor:
        advantage, shifts = super().__call__(steps), turn_rewards(steps.trajectories)
        share = shifts.abs() / shifts.abs().amax(1, keepdim=True).clamp(min=1e-12)
        turn = steps.channel("turn")
        shift, size = shifts[steps.trajectory, turn], share[steps.trajectory, turn]
        agrees = (advantage * shift).sign()
        return torch.where(shift == 0, advantage, advantage * agrees * size * (self.tau * agrees).exp())
