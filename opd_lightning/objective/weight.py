"""Weights: the factor of a step's loss. Never negative, always without gradient; a term multiplies all of its own.

Shape legend: n steps of a chunk, N of a micro-batch, B trajectories of T steps of a generation batch, M steps of all
ranks.
"""

from __future__ import annotations

import math
from abc import ABC
from typing import Literal

import torch
from torch import Tensor

from .generation import Generation
from .signal import Part
from .steps import Steps


class Weight(Part, ABC):
    """Factor w(i, t) ≥ 0 of a step's loss."""


class Constant(Weight):
    """Constant weight.

    Args:
        value: default 1, the reference arm of every weighting.
    """

    scope = "data"

    def __init__(self, value: float = 1.0) -> None:
        if value < 0:
            raise ValueError(f"weight.value must be >= 0, got {value}")
        self.value = value

    def __call__(self, steps: Steps) -> Tensor:
        return torch.full((len(steps),), self.value, device=steps.index.device)


class Window(Weight):
    """Weight 1 for the steps start ≤ t < stop of each trajectory, and of these for its ``last``, 0 elsewhere.

    This picks which steps are *trained*; how far rollouts *go* is `Rollout.horizon`. The two are not interchangeable
    (ESR, 2605.27028: the first 100 steps generated beat 100 steps picked from full rollouts).

    Args:
        start: steps left out at the beginning. Default 0; SDFT (2601.19897) leaves out 3.
        stop: first step left out at the end. Default: none.
        last: how many trained steps count, from the trajectory's end. Default: all; SPEAR (2605.07977) unlearns the
            last 32.
    """

    scope = "data"

    def __init__(self, start: int = 0, stop: int | None = None, last: int | None = None) -> None:
        if start < 0 or (stop is not None and stop <= start):
            raise ValueError(f"weight: need 0 <= start < stop, got start={start}, stop={stop}")
        if last is not None and last < 1:
            raise ValueError(f"weight.last must be >= 1, got {last}")
        self.start, self.stop, self.last = start, stop, last

    def __call__(self, steps: Steps) -> Tensor:
        inside = steps.position >= self.start
        if self.stop is not None:
            inside &= steps.position < self.stop
        if self.last is not None:
            left = steps.trajectories.mask.flip(1).cumsum(1).flip(1)  # trained steps from here on, this one included
            inside &= left.flatten()[steps.index] <= self.last
        return inside.float()


class Turns(Weight):
    """Weight 1 for the turns start ≤ k < stop of each trajectory, and of its turns for the ``last``, 0 elsewhere.

    How many turns rollouts *have* is `Rollout.turns`. ``Turns(last=1)`` trains the answer alone,
    behind what was done for it.

    Args:
        start: turns left out at the beginning. Default 0.
        stop: first turn left out at the end. Default: none.
        last: how many turns count, from the trajectory's end. Default: all.

    Raises:
        ValueError: an empty range of turns.
    """

    scope = "data"
    needs = frozenset({"turn"})

    def __init__(self, start: int = 0, stop: int | None = None, last: int | None = None) -> None:
        if start < 0 or (stop is not None and stop <= start) or (last is not None and last < 1):
            raise ValueError(
                f"Turns: need 0 <= start < stop and last >= 1, got start={start}, stop={stop} and last={last}"
            )
        self.start, self.stop, self.last = start, stop, last

    def __call__(self, steps: Steps) -> Tensor:
        turn = steps.channel("turn")
        inside = turn >= self.start
        if self.stop is not None:
            inside &= turn < self.stop
        if self.last is not None:
            turns = steps.trajectories.channels["turn"].masked_fill(~steps.trajectories.mask, 0).amax(1) + 1
            inside &= turn >= steps.per_trajectory(turns) - self.last
        return inside.float()


class TurnMean(Weight):
    """Weight T / n_k of the n_k steps of turn k, T those of the trajectory: each turn counts as much as another.

    With the normalizer ``trajectories``, which divides by T, it is the sum over turns of the mean over a turn's steps
    (CoARS, 2604.10029; MAD-OPD, 2605.01347).
    """

    scope = "data"
    needs = frozenset({"turn"})

    def __call__(self, steps: Steps) -> Tensor:
        batch = steps.trajectories
        turn = batch.channels["turn"]
        sizes = torch.zeros(len(batch), int(turn.max()) + 1, device=turn.device)
        size = sizes.scatter_add(1, turn, batch.mask.float()).gather(1, turn)
        return steps.per_trajectory(batch.length) / size.flatten()[steps.index]


class Entropy(Weight):
    """Soft factor exp(−β·H) that trusts certain states more (β > 0) or less (β < 0).

    SRPO (2604.02288) weights by exp(−β·H_teacher) and divides by the mean of that over the steps it distills, which
    keeps the loss's scale; here nothing is divided, so that β makes steps smaller unless the term's ``normalizer`` is
    ``weights``.

    Args:
        of: whose entropy H, in nats at temperature 1.
        beta: default 1 (SRPO).
    """

    def __init__(self, of: Literal["teacher", "student"] = "teacher", beta: float = 1.0) -> None:
        self.of, self.beta = of, beta
        self.needs = frozenset({"teacher"}) if of == "teacher" else frozenset()
        self.reads = frozenset({f"{of}/entropy"})

    def __call__(self, steps: Steps) -> Tensor:
        return (-self.beta * steps.statistic(f"{self.of}/entropy")).exp()


class Confidence(Weight):
    """Teacher's confidence 1 − H / log V, in [0, 1] (GUI-SD, 2605.00642).

    0 where the teacher is uniform, 1 where it is certain. H at temperature 1; V counts every row of the head that can
    be an action.
    """

    needs = frozenset({"teacher", "categorical"})
    reads = frozenset({"teacher/confidence"})

    def __call__(self, steps: Steps) -> Tensor:
        return steps.statistic("teacher/confidence")


class ImportanceRatio(Weight):
    """Importance ratio min(p_θ(action) / p_behavior(action), cap): 1 while rollouts are fresh.

    Args:
        cap: default 2 (Vision-OPD, 2605.18740).
    """

    needs = frozenset({"behavior"})
    reads = frozenset({"student/log_prob"})

    def __init__(self, cap: float = 2.0) -> None:
        if cap <= 0:
            raise ValueError(f"weight.cap must be > 0, got {cap}")
        self.cap = cap

    def __call__(self, steps: Steps) -> Tensor:
        log_ratio = steps.statistic("student/log_prob") - steps.behavior_log_prob
        return log_ratio.exp().clamp(max=self.cap)


EQUAL = 1e-5
"""Tolerance, in nats or as a share of the larger, between two computations of the same entropy: in another micro-batch
a state has another padding, and its sums another order."""


def at_least(values: Tensor, share: float) -> Tensor:
    """Returns the value that the highest ``share`` of ``values [M]`` reach, a scalar.

    The value at the (1 − share) quantile, or the next higher one where it lies between two, lowered by as much
    as equal values may differ: whatever equals it is in.
    """
    # 1e-6: an integral rank may lie a rounding error above its integer
    rank = math.ceil((1 - share) * (len(values) - 1) - 1e-6)
    reached = values.float().kthvalue(rank + 1).values
    return reached - EQUAL * reached.abs().clamp(min=1)


class TopEntropy(Weight):
    """Weight 1 for the ``share`` of steps with the highest entropy, 0 elsewhere.

    States whose entropies are equal are in or out together (see `at_least`), so that no rounding chooses among them.

    Args:
        share: default 0.5, the largest ratio that TIP (2604.14084) keeps. This is not its rule: TIP keeps the top share
            of each rollout by a score of entropy and disagreement, and its entropy baseline draws steps with
            probability ∝ H.
        of: whose entropy.
        scope: the quantile is taken over the whole generation batch on all ranks (default), where the term is on, or
            over each trajectory (``row``). Over a batch it costs a forward pass when the batch is rolled out.
    """

    def __init__(
        self,
        share: float = 0.5,
        of: Literal["teacher", "student"] = "student",
        scope: Literal["row", "generation"] = "generation",
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"weight.share must be in (0, 1], got {share}")
        self.share, self.of, self.scope = share, of, scope
        self.needs = frozenset({"teacher"}) if of == "teacher" else frozenset()
        self.reads = frozenset({f"{of}/entropy"})

    def __call__(self, steps: Steps) -> Tensor:
        entropy = steps.statistic(f"{self.of}/entropy").float()
        chosen = torch.zeros_like(entropy)
        for row in steps.trajectory.unique():
            of_row = steps.trajectory == row
            chosen[of_row] = (entropy[of_row] >= at_least(entropy[of_row], self.share)).float()
        return chosen

    def settle(self, generation: Generation) -> Tensor:
        entropy = generation.statistics[f"{self.of}/entropy"]
        on = generation.on & ~entropy.isnan()
        # every rank asks, also one that has no such step
        everywhere = generation.everywhere(entropy[on])
        if not len(everywhere):
            return torch.zeros_like(entropy)
        return (on & (entropy >= at_least(everywhere, self.share))).float()


class Outcome(Weight):
    """Weight of whole trajectories by correctness.

    Args:
        right: weight where the reward is at least ``threshold``, default 1.
        wrong: weight elsewhere, default 0.
        threshold: default 0.5 (SDPO, 2601.20802).
    """

    needs = frozenset({"reward"})
    scope = "data"

    def __init__(self, right: float = 1.0, wrong: float = 0.0, threshold: float = 0.5) -> None:
        if min(right, wrong) < 0:
            raise ValueError(f"weight: right and wrong must be >= 0, got {right} and {wrong}")
        self.right, self.wrong, self.threshold = right, wrong, threshold

    def __call__(self, steps: Steps) -> Tensor:
        reward = steps.trajectories.reward
        assert reward is not None
        won = steps.per_trajectory(reward) >= self.threshold
        return torch.where(won, self.right, self.wrong)


class PassRate(Weight):
    """Weight p^easy · (1 − p)^hard, p the mean reward of the group (PACED, 2603.11178). Rewards must lie in [0, 1].

    Prompts that are always or never solved have weight 0. The paper estimates p from rollouts of its own; here the
    trained ones are its estimate. Whether it divides by the weights' sum was not found: the term's ``normalizer``
    decides.

    Args:
        easy, hard: the exponents a and b. Default 1 and 1 (PACED).

    Raises:
        ValueError: an exponent that is not positive.
    """

    needs = frozenset({"reward", "group"})
    scope = "data"

    def __init__(self, easy: float = 1.0, hard: float = 1.0) -> None:
        if min(easy, hard) <= 0:
            raise ValueError(f"PassRate: easy and hard must be > 0, got {easy} and {hard}")
        self.easy, self.hard = easy, hard

    def __call__(self, steps: Steps) -> Tensor:
        rate = steps.trajectories.group_mean
        assert rate is not None
        rate = steps.per_trajectory(rate).clamp(0, 1)
        return rate**self.easy * (1 - rate) ** self.hard


class ByReward(Weight):
    """Trajectory's reward, cut off below 0."""

    needs = frozenset({"reward"})
    scope = "data"

    def __call__(self, steps: Steps) -> Tensor:
        reward = steps.trajectories.reward
        assert reward is not None
        return steps.per_trajectory(reward).clamp(min=0)


class Length(Weight):
    """Number T of the trajectory's trained steps, divided by a constant.

    With the normalizer ``trajectories``, which counts a step as 1/T, it makes the sum over a trajectory of the mean:
    divided by a constant (Dr. GRPO, 2503.20783) or not at all (SCOPE, 2604.10688).

    Args:
        per: the constant. Default 1; Dr. GRPO takes the longest rollout that there may be.
    """

    scope = "data"

    def __init__(self, per: float = 1.0) -> None:
        if per <= 0:
            raise ValueError(f"weight.per must be > 0, got {per}")
        self.per = per

    def __call__(self, steps: Steps) -> Tensor:
        return steps.per_trajectory(steps.trajectories.length).float() / self.per


class MeanOne(Weight):
    """Weight divided by its mean over the generation batch, where the term is on: the loss keeps its scale.

    The mean is that of all ranks. FiRe-OPD (2606.02684), RESD (2605.12741) and SRPO (2604.02288).

    Args:
        of: the weight; not one that reads whole distributions, which are not kept so long.
        among: another weight of the term; where it is 0 a step does not count in the mean. Default: all steps count.
    """

    scope = "generation"

    def __init__(self, of: Weight, among: Weight | None = None) -> None:
        self.of, self.among = of, among

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.of.needs if self.among is None else self.of.needs | self.among.needs

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return self.of.reads if self.among is None else self.of.reads | self.among.reads

    def settle(self, generation: Generation) -> Tensor:
        values = self.of.over(generation)
        known = generation.on & ~values.isnan()
        counted = known if self.among is None else known & (self.among.over(generation) != 0)
        everywhere = generation.everywhere(values[counted])
        mean = everywhere.double().mean() if len(everywhere) else torch.tensor(1.0)
        return torch.where(known, values / (mean if float(mean) else 1.0), 0.0).float()
