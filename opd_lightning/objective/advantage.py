"""Advantages: how much better than expected a sampled step was. A term's `PolicyGradient` consumes them.

An advantage is a type of its own. A divergence depends on the prefix alone, so as an advantage its expected gradient
is zero; the types refuse it. The sampled log-ratio δ = log q(y) − log p_θ(y) and the group-relative reward A combine
in the three ways that the field uses: δ alone, A + c·δ, or A scaled by a function of δ with its sign kept.

Shape legend: n steps of a chunk, N of a micro-batch, B trajectories of T steps.
"""

from __future__ import annotations

from abc import ABC
from typing import Literal

import torch
from torch import Tensor

from ..trajectory import Trajectories
from .divergence import ReverseKL
from .generation import Generation
from .signal import Part, Scope
from .steps import OpenSteps, Steps, to_rows

LOG_PROBS = frozenset({"student/log_prob", "teacher/log_prob"})
Against = Literal["student", "behavior"]


def log_probs(against: Against) -> frozenset[str]:
    """Names the statistics that `log_ratio` reads."""
    return LOG_PROBS if against == "student" else LOG_PROBS - {"student/log_prob"}


def log_ratio(steps: Steps, against: Against = "student") -> Tensor:
    """Returns δ = log q(y) − log p(y) ``[n]`` at the sampled action, without gradient.

    p is the student as it is now (``student``), or as it acted (``behavior``).
    """
    log_prob = steps.statistic("student/log_prob") if against == "student" else steps.behavior_log_prob
    return steps.statistic("teacher/log_prob") - log_prob


def is_right(steps: Steps) -> Tensor:
    """Returns where the trajectory's reward is at least 0.5, ``[N]`` bool (SDPO, 2601.20802)."""
    assert steps.trajectories.reward is not None
    return steps.per_trajectory(steps.trajectories.reward) >= 0.5


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


class Advantage(Part, ABC):
    """Advantage of a sampled step, without gradient."""


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
        baseline: a `ReverseKL` whose value is added: −KL(p‖q) is what δ is on average, so that it takes variance away
            and no bias in (vOPD, 2605.07865, on the student's 20 likeliest ids, renormalized). None (default): none.

    Raises:
        ValueError: a number out of range, or a baseline beside what it is not the mean of.
    """

    def __init__(
        self,
        clip: float | None = None,
        discount: float = 0.0,
        length_normalized: bool = False,
        against: Against = "student",
        baseline: ReverseKL | None = None,
    ) -> None:
        if against not in ("student", "behavior"):
            raise ValueError(f"advantage.against is student or behavior, not {against!r}")
        if not 0 <= discount <= 1:
            raise ValueError(f"advantage.discount must be in [0, 1], got {discount}")
        if clip is not None and clip <= 0:
            raise ValueError(f"advantage.clip must be > 0, got {clip}")
        if length_normalized and discount == 0:
            raise ValueError("advantage.length_normalized: there is no return to normalize while discount is 0")
        if baseline is not None and (discount or against == "behavior"):
            raise ValueError(
                "advantage.baseline is the mean of a step's own log-ratio against the student as it is now: it goes "
                "with discount 0 and against student"
            )
        self.clip, self.discount, self.length_normalized = clip, discount, length_normalized
        self.against, self.baseline = against, baseline
        self.scope = "row" if discount else "step"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        needs = frozenset({"teacher"} if self.against == "student" else {"teacher", "behavior"})
        return needs if self.baseline is None else needs | self.baseline.needs

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return log_probs(self.against)

    def __call__(self, steps: Steps) -> Tensor:
        ratio = log_ratio(steps, self.against)
        if self.clip is not None:
            ratio = ratio.clamp(-self.clip, self.clip)
        if self.baseline is not None:
            assert isinstance(steps, OpenSteps)
            with torch.no_grad():
                return ratio + self.baseline(steps)
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

    needs = frozenset({"reward", "group"})
    scope: Scope = "data"
    scale: bool = True  # also of a subclass whose own __init__ doesn't call this one

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


class TurnRelative(Advantage):
    """Advantage of a turn among those of its number in the group: GRPO, turn by turn (ours).

    (G_k − mean) / (standard deviation + 1e-6) over the group's trajectories that have a turn k, where G_k = Σ_{j≥k}
    γ^(j−k)·r_j are the environment's rewards from turn k on. One turn, or γ = 1 and rewards at the end alone, is
    `GroupRelative` among trajectories of equally many turns.

    Args:
        discount: γ, default 1.
        scale: divide by the standard deviation (default).

    Raises:
        ValueError: a discount that is not in [0, 1].
    """

    needs = frozenset({"turn", "turn_reward", "group"})
    scope: Scope = "generation"

    def __init__(self, discount: float = 1.0, scale: bool = True) -> None:
        if not 0 <= discount <= 1:
            raise ValueError(f"advantage.discount must be in [0, 1], got {discount}")
        self.discount, self.scale = discount, scale

    def settle(self, generation: Generation) -> Tensor:
        batch = generation.trajectories
        turn, rewards = batch.channels["turn"], turn_rewards(batch)
        has = torch.zeros_like(rewards).scatter_add(1, turn, batch.mask.float()) > 0
        returns = returns_to_go(rewards, has, self.discount, normalize=False)
        advantage = torch.zeros_like(returns)
        for group in batch.group.unique():
            for number in range(rewards.shape[1]):
                here = (batch.group == group) & has[:, number]
                values = returns[here, number]
                spread = values.std(correction=0) + 1e-6 if self.scale else 1.0
                advantage[here, number] = (values - values.mean()) / spread
        return advantage.gather(1, turn)


def turn_rewards(batch: Trajectories) -> Tensor:
    """Collects the environment's reward of each turn, ``[B, turns]``; 0 where nobody knows it."""
    turn, reward = batch.channels["turn"], batch.channels["reward"].nan_to_num()
    return reward.new_zeros(len(batch), int(turn.max()) + 1).scatter_add(1, turn, reward)


class RewardPlusLogRatio(GroupRelative):
    """Advantage A + c·δ: the teacher still teaches where a group's rewards are all equal.

    Args:
        coefficient: c, default 1 (no source: papers tune it).
        scale: as in `GroupRelative`.
        against: as in `LogRatio`.
    """

    scope: Scope = "step"

    def __init__(self, coefficient: float = 1.0, scale: bool = True, against: Against = "student") -> None:
        super().__init__(scale)
        self.coefficient, self.against = coefficient, against

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return GroupRelative.needs | ({"teacher"} if self.against == "student" else {"teacher", "behavior"})

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return log_probs(self.against)

    def __call__(self, steps: Steps) -> Tensor:
        return super().__call__(steps) + self.coefficient * log_ratio(steps, self.against)


class TeacherShare(GroupRelative):
    """Group-relative advantage that a teacher's log-ratio changes by a share; at 0 no teacher is asked."""

    share: float

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return GroupRelative.needs | ({"teacher"} if self.share else frozenset())

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return LOG_PROBS if self.share else frozenset()


class RewardTimesLogRatio(TeacherShare):
    """Advantage A·[(1−λ) + λ·clip(exp(sign(A)·δ), 1−ε, 1+ε)]: the verifier sets the sign, the teacher the size.

    RLSD (2604.03128).

    Args:
        share: λ, default 0.5 (RLSD starts there and decays it to 0 over 50 steps). At 0 no teacher is asked.
        clip: ε, default 0.2 (RLSD).
        scale: as in `GroupRelative`.
        reverse: exp(−sign(A)·δ): what the teacher would not have chosen counts more (RLRT, 2605.10781). Default: no.
        only_right: leave A as it is where the reward is below 0.5 (RLRT, which collapses without). Default: no.
    """

    scope: Scope = "step"

    def __init__(
        self,
        share: float = 0.5,
        clip: float = 0.2,
        scale: bool = True,
        reverse: bool = False,
        only_right: bool = False,
    ) -> None:
        super().__init__(scale)
        if not 0 <= share <= 1:
            raise ValueError(f"advantage.share must be in [0, 1], got {share}")
        if not 0 < clip <= 1:
            raise ValueError(f"advantage.clip must be in (0, 1], or the sign could flip; got {clip}")
        self.share, self.clip, self.reverse, self.only_right = share, clip, reverse, only_right

    def __call__(self, steps: Steps) -> Tensor:
        advantage = super().__call__(steps)
        if not self.share:
            return advantage
        direction = -advantage.sign() if self.reverse else advantage.sign()
        # the exponent is bounded before exp, so that one impossible step cannot overflow
        factor = (direction * self.evidence(steps)).clamp(-20, 20).exp().clamp(1 - self.clip, 1 + self.clip)
        scaled = advantage * ((1 - self.share) + self.share * factor)
        return torch.where(is_right(steps), scaled, advantage) if self.only_right else scaled

    def evidence(self, steps: Steps) -> Tensor:
        """Returns what the sampled step is weighed by, δ ``[n]``."""
        return log_ratio(steps)
