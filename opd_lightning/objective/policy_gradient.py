"""Policy gradient on the sampled steps: advantages, and the clipped surrogate that consumes them.

An advantage is a type of its own. A divergence depends on the prefix alone, so as an advantage its expected gradient
is zero; the types refuse it. The sampled log-ratio δ = log q(y) − log p_θ(y) and the group-relative reward A combine
in the three ways that the field uses: δ alone, A + c·δ, or A scaled by a function of δ with its sign kept.

Shape legend: n steps of a chunk, N of a micro-batch.
"""

from __future__ import annotations

from abc import ABC
from typing import Literal

import torch
from torch import Tensor

from .signal import Part, Scope, Signal
from .steps import OpenSteps, Steps, to_rows

LOG_PROBS = frozenset({"student/log_prob", "teacher/log_prob"})
Against = Literal["student", "behavior"]


def log_ratio(steps: Steps, against: Against = "student") -> Tensor:
    """Returns δ = log q(y) − log p(y) ``[n]`` at the sampled action, without gradient.

    p is the student as it is now (``student``), or as it acted (``behavior``).
    """
    log_prob = steps.statistic("student/log_prob") if against == "student" else steps.behavior_log_prob
    return steps.statistic("teacher/log_prob") - log_prob


def returns_to_go(values: Tensor, mask: Tensor, discount: float, normalize: bool) -> Tensor:
    """Returns Σ_{i≥t} discount^(i−t)·values_i ``[B, T]`` over the trained steps of a row.

    With ``normalize`` divided by the number of trained steps left, t included (MiniLLM's length normalization).
    """
    total, left = torch.zeros_like(values), torch.zeros_like(values)
    running, count = values.new_zeros(len(values)), values.new_zeros(len(values))
    # backwards, one trained step after the other; untrained steps in between pass the running sum on
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        running = torch.where(here, values[:, t] + discount * running, running)
        count = count + here
        total[:, t], left[:, t] = running, count
    return total / left.clamp(min=1) if normalize else total


def surrogate(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Returns −min(ρA, clip(ρ, 1−low, 1+high)·A) ``[n]`` with ρ = exp(log_prob − old_log_prob) (PPO)."""
    ratio = (log_prob - old_log_prob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


class Advantage(Part, ABC):
    """Advantage of a sampled step, without gradient.

    A subclass of scope ``generation`` implements `settle`, any other `__call__`.
    """

    def __call__(self, steps: Steps) -> Tensor:
        """Returns ``[n]`` of an open chunk's `OpenSteps` for the scope ``step``, ``[N]`` for ``data`` and ``row``."""
        raise NotImplementedError(f"{type(self).__name__} has the scope {self.scope}, but no method __call__")


class LogRatio(Advantage):
    """Log-ratio δ = log q(y) − log p(y), or its discounted return-to-go.

    Args:
        against: whose p: the student's as it is now (``student``, default: Lightning OPD, 2604.13010, and OPSD,
            2601.18734), or as it acted (``behavior``: K1 of Thinking Machines' recipe, of TCOD, 2604.24005, and of
            MiniLLM). The same in the first optimizer step after acting.
        clip: bound on |δ| (Lightning OPD, 2604.13010, uses 10). None: no bound.
        discount: γ of the return-to-go; 0 (default) keeps the immediate step only, as in Thinking Machines' recipe.
            MiniLLM (2306.08543) uses 0.95.
        length_normalized: divide the return by the number of steps left, as MiniLLM's released code does.
    """

    needs = frozenset({"teacher", "behavior"})

    def __init__(
        self,
        clip: float | None = None,
        discount: float = 0.0,
        length_normalized: bool = False,
        against: Against = "student",
    ) -> None:
        if against not in ("student", "behavior"):
            raise ValueError(f"advantage.against is student or behavior, not {against!r}")
        if not 0 <= discount <= 1:
            raise ValueError(f"advantage.discount must be in [0, 1], got {discount}")
        if clip is not None and clip <= 0:
            raise ValueError(f"advantage.clip must be > 0, got {clip}")
        if length_normalized and discount == 0:
            raise ValueError("advantage.length_normalized: there is no return to normalize while discount is 0")
        self.clip, self.discount, self.length_normalized = clip, discount, length_normalized
        self.against = against
        self.scope = "row" if discount else "step"

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return LOG_PROBS if self.against == "student" else LOG_PROBS - {"student/log_prob"}

    def __call__(self, steps: Steps) -> Tensor:
        ratio = log_ratio(steps, self.against)
        if self.clip is not None:
            ratio = ratio.clamp(-self.clip, self.clip)
        if not self.discount:
            return ratio
        mask = to_rows(steps, torch.ones_like(ratio)).bool()
        returns = returns_to_go(to_rows(steps, ratio), mask, self.discount, self.length_normalized)
        return returns.flatten()[steps.index]


class GroupRelative(Advantage):
    """Advantage A = (R − group mean) / (group standard deviation + 1e-6) (GRPO, 2402.03300).

    Args:
        scale: divide by the standard deviation (default). False is Dr. GRPO (2503.20783).
    """

    needs = frozenset({"reward", "group", "behavior"})
    scope: Scope = "data"

    def __init__(self, scale: bool = True) -> None:
        self.scale = scale

    def __call__(self, steps: Steps) -> Tensor:
        batch = steps.trajectories
        assert batch.reward is not None
        assert batch.group_mean is not None
        assert batch.group_std is not None
        advantage = batch.reward - batch.group_mean
        if self.scale:
            advantage = advantage / (batch.group_std + 1e-6)
        return steps.per_trajectory(advantage)


class RewardPlusLogRatio(GroupRelative):
    """Advantage A + c·δ: the teacher still teaches where a group's rewards are all equal.

    Args:
        coefficient: c, default 1 (no source: papers tune it).
        scale: as in `GroupRelative`.
        against: as in `LogRatio`.
    """

    needs = GroupRelative.needs | LogRatio.needs
    scope: Scope = "step"

    def __init__(self, coefficient: float = 1.0, scale: bool = True, against: Against = "student") -> None:
        super().__init__(scale)
        self.coefficient, self.against = coefficient, against

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return LOG_PROBS if self.against == "student" else LOG_PROBS - {"student/log_prob"}

    def __call__(self, steps: Steps) -> Tensor:
        return super().__call__(steps) + self.coefficient * log_ratio(steps, self.against)


class RewardTimesLogRatio(GroupRelative):
    """Advantage A·[(1−λ) + λ·clip(exp(sign(A)·δ), 1−ε, 1+ε)]: the verifier sets the sign, the teacher the size.

    RLSD (2604.03128).

    Args:
        share: λ, default 0.5 (RLSD starts there and decays it to 0 over 50 steps). At 0 no teacher is asked.
        clip: ε, default 0.2 (RLSD).
        scale: as in `GroupRelative`.
    """

    scope: Scope = "step"

    def __init__(self, share: float = 0.5, clip: float = 0.2, scale: bool = True) -> None:
        super().__init__(scale)
        if not 0 <= share <= 1:
            raise ValueError(f"advantage.share must be in [0, 1], got {share}")
        if not 0 < clip <= 1:
            raise ValueError(f"advantage.clip must be in (0, 1], or the sign could flip; got {clip}")
        self.share, self.clip = share, clip

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return GroupRelative.needs | (LogRatio.needs if self.share else frozenset())

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return LOG_PROBS if self.share else frozenset()

    def __call__(self, steps: Steps) -> Tensor:
        advantage = super().__call__(steps)
        if not self.share:
            return advantage
        # the exponent is bounded before exp, so that one impossible step cannot overflow
        factor = (advantage.sign() * log_ratio(steps)).clamp(-20, 20).exp().clamp(1 - self.clip, 1 + self.clip)
        return advantage * ((1 - self.share) + self.share * factor)


class PolicyGradient(Signal):
    """Clipped importance-weighted surrogate −min(ρA, clip(ρ, 1−ε_low, 1+ε_high)·A), A detached.

    ρ is the ratio of the student's probability now to the one stored when the step was sampled, both at temperature 1.
    On the first pass over a rollout ρ = 1 and the gradient is −A·∇log p_θ(y).

    Args:
        advantage: an `Advantage`. A divergence is not one.
        clip: ε_low, default 0.2 (PPO).
        clip_high: ε_high, default the same as ``clip``.

    Raises:
        TypeError: ``advantage`` is a divergence or anything else that is not an `Advantage`.
        ValueError: a clip is not positive.
    """

    def __init__(self, advantage: Advantage, clip: float = 0.2, clip_high: float | None = None) -> None:
        if not isinstance(advantage, Advantage):
            raise TypeError(
                f"signal.advantage must be an Advantage such as LogRatio, got {type(advantage).__name__}. What depends "
                "on the prefix alone, as a divergence does, has zero expected gradient as an advantage; "
                "use it as a signal of its own."
            )
        self.advantage, self.clip = advantage, clip
        self.clip_high = clip if clip_high is None else clip_high
        if min(self.clip, self.clip_high) <= 0:
            raise ValueError(f"signal.clip and clip_high must be > 0, got {self.clip} and {self.clip_high}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.advantage.needs | {"behavior"}

    def __call__(self, steps: OpenSteps) -> Tensor:
        assert steps.advantage is not None
        advantage = steps.advantage
        log_prob, old = steps.student.log_prob(steps.action), steps.behavior_log_prob
        # unknown where another term trains (`check` sees to that); its NaN would survive a weight of 0 in the gradient
        old = torch.where(old.isnan(), log_prob.detach(), old)
        return surrogate(log_prob, old, advantage, self.clip, self.clip_high)
