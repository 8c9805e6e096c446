"""Weights of single papers. δ = log q(y) − log p(y) at the sampled action.

Shape legend: n steps of a chunk, N of a micro-batch, B trajectories of T steps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..objective.advantage import LOG_PROBS, log_ratio
from ..objective.generation import Generation
from ..objective.signal import Scope
from ..objective.steps import Steps
from ..objective.weight import Weight


class Evidence(Weight):
    """Weight 1 where the teacher's text supports the step, e = log q(y) − log q₀(y) > τ (EDGE-OPD, 2605.23493).

    Args:
        threshold: τ, default 0 (EDGE-OPD).
        other: whose q₀: an entry of ``model.teachers`` that is not shown the text, or ``student`` (default), which is
            the same where the teacher's weights are `Live`.
    """

    needs = frozenset({"teacher"})

    def __init__(self, threshold: float = 0.0, other: str = "student") -> None:
        self.threshold, self.other = threshold, other
        self.reads = frozenset({"teacher/log_prob", f"{other}/log_prob"})

    def __call__(self, steps: Steps) -> Tensor:
        evidence = steps.statistic("teacher/log_prob") - steps.statistic(f"{self.other}/log_prob")
        return (evidence > self.threshold).float()


class Doubt(Weight):
    """Weight 1 − p(y): what the student is sure of counts less (MSD, 2605.02971)."""

    reads = frozenset({"student/log_prob"})
    needs = frozenset({"categorical"})

    def __call__(self, steps: Steps) -> Tensor:
        # rounding may leave log p above 0; expm1 keeps the digits of 1 − p where p is nearly 1
        return -steps.statistic("student/log_prob").clamp(max=0).expm1()


class TokenIds(Weight):
    """Weight ``value`` where the action is one of some ids, 1 elsewhere (Rock tokens, 2605.09253).

    The action is the one that the step's loss is about, and the normalizer knows nothing of the weight.

    Args:
        ids: of the vocabulary, such as those that `RockTokens` finds.
        value: default 0, which freezes them (2605.09253); 1 is the loss without the weight.
    """

    scope = "data"
    needs = frozenset({"categorical"})

    def __init__(self, ids: list[int], value: float = 0.0) -> None:
        if value < 0 or not ids:
            raise ValueError(f"weight: ids must not be empty and value >= 0, got {ids} and {value}")
        self.ids, self.value = ids, value

    def __call__(self, steps: Steps) -> Tensor:
        is_one = torch.isin(steps.action, torch.tensor(self.ids, device=steps.action.device))
        return torch.where(is_one, self.value, 1.0)


class Agreement(Weight):
    """Weight [δ]₊ / ([δ]₊ + H_teacher): high where a sure teacher wants more of the step (2605.11182).

    Args:
        complement: 1 − that, for the other of two terms. Default: no.
    """

    needs = frozenset({"teacher", "categorical"})
    reads = LOG_PROBS | {"teacher/entropy"}

    def __init__(self, complement: bool = False) -> None:
        self.complement = complement

    def __call__(self, steps: Steps) -> Tensor:
        wanted = log_ratio(steps).clamp(min=0)
        # both may be 0, and rounding may leave an entropy below it
        gate = wanted / (wanted + steps.statistic("teacher/entropy").clamp(min=0) + 1e-8)
        return 1 - gate if self.complement else gate


class Accepted(Weight):
    """Weight 1 with probability min(q(y)/p(y), 1), 0 otherwise: whether the teacher would take the step (2606.01249).

    Drawn by trajectory and position (`Steps.uniform`), so that two terms split the steps between them.

    Args:
        complement: 1 where it would not, for the other term. Default: no.
    """

    needs = frozenset({"teacher"})
    reads = LOG_PROBS

    def __init__(self, complement: bool = False) -> None:
        self.complement = complement

    def __call__(self, steps: Steps) -> Tensor:
        accepted = steps.uniform("accepted") < log_ratio(steps).clamp(max=0).exp()
        return (~accepted if self.complement else accepted).float()


class SuccessShare(Weight):
    """Weight (1 − s)^a of right trajectories and s^b of wrong ones, s the share of right ones (RESD, 2605.12741).

    s is that of the generation batch on all ranks, where the term is on, and kept in [1/B, 1 − 1/B] as in RESD's code:
    the rarer outcome counts more. RESD divides by the mean (`MeanOne`).

    Args:
        right, wrong: the exponents a and b. Default 1 and 1 (RESD).
    """

    needs = frozenset({"reward"})
    scope: Scope = "generation"

    def __init__(self, right: float = 1.0, wrong: float = 1.0) -> None:
        self.right, self.wrong = right, wrong

    def settle(self, generation: Generation) -> Tensor:
        assert generation.trajectories.reward is not None
        is_right = generation.trajectories.reward >= 0.5
        everywhere = generation.everywhere(is_right[generation.on.any(1)].float())
        count = max(len(everywhere), 2)
        share = (everywhere.mean() if len(everywhere) else torch.tensor(0.5)).clamp(1 / count, 1 - 1 / count)
        weight = torch.where(is_right, (1 - share) ** self.right, share**self.wrong)
        return weight[:, None].expand(generation.on.shape).clone()


class Sureness(Weight):
    """Weight (1 + α·c)·(1 + β·u): a sure teacher, c = 1 − H_teacher/max, a puzzled student, u = H_student/max.

    FiRe-OPD (2606.02684), which divides by the mean (`MeanOne`). Both maxima are those of the generation batch on all
    ranks, where the term is on.

    Args:
        alpha, beta: default 1 and 1 (FiRe-OPD).
    """

    needs = frozenset({"teacher", "categorical"})
    reads = frozenset({"teacher/entropy", "student/entropy"})
    scope: Scope = "generation"

    def __init__(self, alpha: float = 1.0, beta: float = 1.0) -> None:
        if min(alpha, beta) < 0:
            raise ValueError(f"weight: alpha and beta must be >= 0, got {alpha} and {beta}")
        self.alpha, self.beta = alpha, beta

    def settle(self, generation: Generation) -> Tensor:
        shares = []
        for name in ("teacher/entropy", "student/entropy"):
            entropy = generation.statistics[name]
            known = generation.on & ~entropy.isnan()
            everywhere = generation.everywhere(entropy[known])
            largest = everywhere.amax().clamp(min=1e-12) if len(everywhere) else torch.tensor(1.0)
            shares.append(torch.where(known, entropy / largest, 0.0).clamp(0, 1))
        return (1 + self.alpha * (1 - shares[0])) * (1 + self.beta * shares[1])


class PerplexityShare(Weight):
    """Weight of a trajectory among those of its group that are right, or that are wrong; they add up to 1.

    SCOPE (2604.10688): of right ones ∝ the student's perplexity^(1/τ), of wrong ones ∝ the teacher's perplexity^(−1/τ);
    0 for the others.

    Args:
        of: ``right`` (default) or ``wrong``.
        tau: τ, default 1 (SCOPE).
    """

    scope: Scope = "generation"

    def __init__(self, of: Literal["right", "wrong"] = "right", tau: float = 1.0) -> None:
        if of not in ("right", "wrong") or tau <= 0:
            raise ValueError(f"weight: of is right or wrong and tau > 0, got {of!r} and {tau}")
        self.of, self.tau = of, tau
        self.needs = frozenset({"reward", "group"} | ({"teacher"} if of == "wrong" else set()))
        self.reads = frozenset({"student/log_prob" if of == "right" else "teacher/log_prob"})

    def settle(self, generation: Generation) -> Tensor:
        (name,) = self.reads
        log_prob = generation.statistics[name]
        known = generation.on & ~log_prob.isnan()
        mean = torch.where(known, log_prob, 0.0).sum(1) / known.sum(1).clamp(min=1)
        assert generation.trajectories.reward is not None
        is_right = generation.trajectories.reward >= 0.5
        routed = known.any(1) & (is_right if self.of == "right" else ~is_right)
        score = (-mean if self.of == "right" else mean) / self.tau
        weight = torch.zeros_like(mean)
        for group in generation.trajectories.group.unique():
            here = routed & (generation.trajectories.group == group)
            weight[here] = score[here].softmax(0)
        return weight[:, None].expand(known.shape).clone()


class Fallback(Weight):
    """Weight 0 where a wrong rollout is taught by a teacher, 1 elsewhere: SRPO's branch for GRPO (2604.02288).

    w = 1 − (1 − c)·m with c = 1 where the reward is at least ``threshold``, and m = 1 where the teacher's view shows
    something.

    Args:
        teacher: the entry of ``model.teachers`` that teaches the others.
        threshold: default 0.5 (SDPO, 2601.20802, on whose settings SRPO builds).
    """

    needs = frozenset({"reward"})
    scope: Scope = "data"

    def __init__(self, teacher: str = "teacher", threshold: float = 0.5) -> None:
        self.teacher, self.threshold = teacher, threshold

    @property
    def streams(self) -> set[str]:
        return {self.teacher}

    def __call__(self, steps: Steps) -> Tensor:
        assert steps.trajectories.reward is not None
        is_wrong = steps.per_trajectory(steps.trajectories.reward) < self.threshold
        return 1 - (is_wrong & steps.knows(self.teacher)).float()


class TeacherRatio(Weight):
    """Weight min(q(y)/p(y), cap): what the teacher would hardly have done counts little (2605.08737).

    Args:
        cap: default 5 (2605.08737).
    """

    needs = frozenset({"teacher"})
    reads = LOG_PROBS

    def __init__(self, cap: float = 5.0) -> None:
        if cap <= 0:
            raise ValueError(f"weight.cap must be > 0, got {cap}")
        self.cap = cap

    def __call__(self, steps: Steps) -> Tensor:
        # bounded before exp, so that one impossible step cannot overflow
        return log_ratio(steps).clamp(max=20).exp().clamp(max=self.cap)


class EntropySample(Weight):
    """Weight 1 for steps of a trajectory that are drawn with probabilities ∝ H^exponent, 0 for the rest (2605.08741).

    ⌊share·T⌋ of T steps, at least one, are drawn without replacement (`Steps.uniform`).

    Args:
        share: how many. Default 0.5 (TIP's largest, 2604.14084; OPHSD's was not found).
        exponent: default 2 (OPHSD's code). At 0 all steps are equally likely.
        of: whose entropy H. Default the student's (ours).
    """

    scope: Scope = "row"

    def __init__(
        self, share: float = 0.5, exponent: float = 2.0, of: Literal["student", "teacher"] = "student"
    ) -> None:
        if not 0 < share <= 1 or exponent < 0:
            raise ValueError(f"weight: share must be in (0, 1] and exponent >= 0, got {share} and {exponent}")
        self.share, self.exponent, self.of = share, exponent, of
        self.needs = frozenset({"teacher"}) if of == "teacher" else frozenset()
        self.reads = frozenset({f"{of}/entropy"})

    def __call__(self, steps: Steps) -> Tensor:
        odds = steps.statistic(f"{self.of}/entropy").clamp(min=1e-6) ** self.exponent
        # the largest of u^(1/w) are a draw with the weights w
        score = steps.uniform("entropy sample").clamp(min=1e-12).log() / odds
        drawn = torch.zeros_like(odds)
        for row in steps.trajectory.unique():
            (here,) = (steps.trajectory == row).nonzero(as_tuple=True)
            drawn[here[score[here].topk(max(1, int(self.share * len(here)))).indices]] = 1.0
        return drawn


class Brief(Weight):
    """Weight 1 for right trajectories that are not longer than the mean right one of their group, 0 for the rest.

    OGLS-SD (2605.12400) imitates the ends of short right rollouts, so that lengths stay; what is short was not found,
    this rule is ours.
    """

    needs = frozenset({"reward", "group"})
    scope: Scope = "generation"

    def settle(self, generation: Generation) -> Tensor:
        assert generation.trajectories.reward is not None
        right = (generation.trajectories.reward >= 0.5) & generation.on.any(1)
        length = generation.trajectories.length.double()
        brief = torch.zeros_like(length)
        for group in generation.trajectories.group.unique():
            here = right & (generation.trajectories.group == group)
            brief[here] = (length[here] <= length[here].mean()).double()
        return brief.float()[:, None].expand(generation.on.shape).clone()
