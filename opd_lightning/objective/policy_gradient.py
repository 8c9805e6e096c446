"""Policy gradient on the sampled steps: the clipped surrogate of an advantage.

Shape legend: n steps of a chunk, N of a micro-batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .advantage import Advantage
from .signal import Part, Signal
from .steps import OpenSteps, Steps


def surrogate(ratio: Tensor, advantage: Tensor, low: float | None, high: float | None) -> Tensor:
    """Returns −min(ρA, clip(ρ, 1−low, 1+high)·A) ``[n]`` (PPO, 1707.06347); None: no bound on that side."""
    objective = ratio * advantage
    if low is None and high is None:
        return -objective
    clipped = ratio.clamp(None if low is None else 1 - low, None if high is None else 1 + high)
    return -torch.minimum(objective, clipped * advantage)


class TrajectoryRatio(Part):
    """Importance ratio s = exp(mean over the trajectory's trained steps of log ρ) (GSPO, 2507.18071)."""

    needs = frozenset({"behavior"})
    reads = frozenset({"student/log_prob"})
    scope = "row"

    def __call__(self, steps: Steps) -> Tensor:
        log_ratio = steps.statistic("student/log_prob") - steps.behavior_log_prob
        rows = len(steps.trajectories)
        total = log_ratio.new_zeros(rows).index_add(0, steps.trajectory, log_ratio)
        count = log_ratio.new_zeros(rows).index_add(0, steps.trajectory, torch.ones_like(log_ratio))
        # rows without trained steps have no step that reads it
        return (total / count.clamp(min=1)).exp()[steps.trajectory]


class PolicyGradient(Signal):
    """Clipped importance-weighted surrogate −min(ρA, clip(ρ, 1−ε_low, 1+ε_high)·A), A detached.

    ρ compares the student's probability now with the one stored when the step was sampled, both at temperature 1.
    On the first pass over a rollout ρ = 1 and the gradient is −A·∇log p_θ(y).

    Args:
        advantage: an `Advantage`. A divergence is not one.
        clip: ε_low, default 0.2 (PPO, 1707.06347). None: no bound below.
        clip_high: ε_high, default the same as ``clip``; above it is DAPO's clip-higher (2503.14476).
        ratio: ``step`` (default): each step's own ratio. ``trajectory``: the geometric mean of its trajectory's ratios,
            whose gradient each step has its own part of (GSPO, 2507.18071). ``none``: −A·log p_θ(y), which needs no
            log-probs of acting (Lightning OPD, 2604.13010); ``clip`` is then None.

    Raises:
        TypeError: ``advantage`` is a divergence or anything else that is not an `Advantage`.
        ValueError: a clip is not positive, or there is no ratio that it could bound.
    """

    def __init__(
        self,
        advantage: Advantage,
        clip: float | None = 0.2,
        clip_high: float | None = None,
        ratio: Literal["step", "trajectory", "none"] = "step",
    ) -> None:
        if not isinstance(advantage, Advantage):
            raise TypeError(
                f"signal.advantage must be an Advantage such as LogRatio, got {type(advantage).__name__}. What depends "
                "on the prefix alone, as a divergence does, has zero expected gradient as an advantage; "
                "use it as a signal of its own."
            )
        if ratio not in ("step", "trajectory", "none"):
            raise ValueError(f"signal.ratio is step, trajectory or none, not {ratio!r}")
        self.advantage, self.clip, self.ratio = advantage, clip, ratio
        self.clip_high = clip if clip_high is None else clip_high
        if any(bound is not None and bound <= 0 for bound in (self.clip, self.clip_high)):
            raise ValueError(f"signal.clip and clip_high must be > 0, got {self.clip} and {self.clip_high}")
        if ratio == "none" and self.clip_high is not None:
            raise ValueError("signal.ratio: none leaves nothing to clip; set signal.clip to null")
        self._of_trajectory = TrajectoryRatio()
        self.advice = advantage.advice

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.advantage.needs | (frozenset() if self.ratio == "none" else {"behavior"})

    @property
    def inputs(self) -> dict[str, Part]:
        of_trajectory: dict[str, Part] = {"ratio": self._of_trajectory} if self.ratio == "trajectory" else {}
        return {"advantage": self.advantage} | of_trajectory

    def __call__(self, steps: OpenSteps) -> Tensor:
        advantage, log_prob = steps.inputs["advantage"], steps.student.log_prob(steps.action)
        if self.ratio == "none":
            return -advantage * log_prob
        if self.ratio == "trajectory":
            # worth the trajectory's ratio, with the gradient of the step's own log-prob
            ratio = (log_prob - log_prob.detach()).exp() * steps.inputs["ratio"]
        else:
            # unknown where another term trains (`check` sees to that); its NaN would survive a weight of 0
            old = torch.where(steps.behavior_log_prob.isnan(), log_prob.detach(), steps.behavior_log_prob)
            ratio = (log_prob - old).exp()
        return surrogate(ratio, advantage, self.clip, self.clip_high)
