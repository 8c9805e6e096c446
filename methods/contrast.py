"""Advantages that read several policies or several contexts. A is the group-relative reward.

Shape legend: n steps of a chunk, B trajectories of T steps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

from ..objective.advantage import LOG_PROBS, Advantage, GroupRelative, RewardTimesLogRatio, log_ratio
from ..objective.generation import Generation
from ..objective.signal import Scope
from ..objective.steps import Steps


class RewardTimesContrast(RewardTimesLogRatio):
    """Advantage A·[(1−λ) + λ·clip(exp(sign(A)·Δ), 1−ε, 1+ε)], Δ = log q⁺(y) − log q⁻(y) (CEPO, 2605.19436).

    A token counts that the right answer favors and a wrong one does not. q⁺ is the term's own teacher, shown what is
    right, q⁻ another entry, shown what is wrong.

    Args:
        share: λ, default 0.5 (CEPO starts there and decays it to 0 over 25 steps). At 0 no teacher is asked.
        clip: ε, default 0.2 (CEPO).
        other: the entry of ``model.teachers`` that is q⁻.
        alone: Δ where q⁻'s view shows nothing. ``student``: log q⁺ − log p, as in RLSD (default: CEPO's text).
            ``nothing``: 0, which leaves A (CEPO's code).
        scale: as in `GroupRelative`.
    """

    def __init__(
        self,
        share: float = 0.5,
        clip: float = 0.2,
        other: str = "rejected",
        alone: Literal["student", "nothing"] = "student",
        scale: bool = True,
    ) -> None:
        super().__init__(share, clip, scale)
        if alone not in ("student", "nothing"):
            raise ValueError(f"advantage.alone is student or nothing, not {alone!r}")
        self.other, self.alone = other, alone

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return LOG_PROBS | {f"{self.other}/log_prob"} if self.share else frozenset()

    def evidence(self, steps: Steps) -> Tensor:
        contrast = steps.statistic("teacher/log_prob") - steps.statistic(f"{self.other}/log_prob")
        alone = log_ratio(steps) if self.alone == "student" else torch.zeros_like(contrast)
        return torch.where(steps.knows(self.other), contrast, alone)


class AsymmetricGain(GroupRelative):
    """Advantage A·(1 + Δ): reflection adds to what the verifier says, and never turns it (AMR-SD, 2605.18529).

    Δ = λ·ReLU(I − τ) where A ≥ 0, γ·ReLU(−I − τ) where A < 0, with I = clip(log q(y) − log p(y), ±κ), and 0 where q's
    view shows nothing. A term whose advantage it is has ``teacher: null``, or it would be off there.

    Args:
        right: λ, default 0.2 (AMR-SD, which decays both to 0 over 50 steps).
        wrong: γ, default 0.1 (AMR-SD). With both at 0 no teacher is asked.
        dead_zone: τ, default 0 (ours: AMR-SD prints none).
        clip: κ, default 5 (AMR-SD).
        teacher: the entry of ``model.teachers`` that is q, under another name than ``teacher``.
        scale: as in `GroupRelative`.
    """

    scope: Scope = "step"

    def __init__(
        self,
        right: float = 0.2,
        wrong: float = 0.1,
        dead_zone: float = 0.0,
        clip: float = 5.0,
        teacher: str = "reflected",
        scale: bool = True,
    ) -> None:
        super().__init__(scale)
        if min(right, wrong, dead_zone) < 0 or clip <= 0:
            raise ValueError(
                "advantage: right, wrong and dead_zone must be >= 0 and clip > 0, "
                f"got {right}, {wrong}, {dead_zone} and {clip}"
            )
        if teacher in ("teacher", "student"):
            raise ValueError(
                f"advantage.teacher: {teacher!r} is the term's own; give the entry of model.teachers another name, "
                "such as reflected"
            )
        self.right, self.wrong, self.dead_zone, self.clip, self.teacher = right, wrong, dead_zone, clip, teacher

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"student/log_prob", f"{self.teacher}/log_prob"} if self.right or self.wrong else ())

    def __call__(self, steps: Steps) -> Tensor:
        advantage = super().__call__(steps)
        if not self.reads:
            return advantage
        gain = steps.statistic(f"{self.teacher}/log_prob") - steps.statistic("student/log_prob")
        gain = gain.clamp(-self.clip, self.clip)
        favored, disfavored = relu(gain - self.dead_zone), relu(-gain - self.dead_zone)
        change = torch.where(advantage >= 0, self.right * favored, self.wrong * disfavored)
        return torch.where(steps.knows(self.teacher), advantage * (1 + change), advantage)


class Extrapolated(Advantage):
    """Advantage λ·(log q(y) − log b(y)) − (log p(y) − log b(y)): past the teacher, as seen from a base b (2605.08737).

    Its fixed point is ∝ b·(q/b)^λ. `LogLinear` has the same one, normalized at each state, and no cap on the ratio of
    q and p beside it (`TeacherRatio`).

    Args:
        strength: λ. Default 1, where the base cancels and is not asked: that is `LogRatio`.
        base: the entry of ``model.teachers`` that is b, such as the student before training. Where its view shows
            nothing, λ is 1.
    """

    needs = frozenset({"teacher"})

    def __init__(self, strength: float = 1.0, base: str = "base") -> None:
        if strength <= 0:
            raise ValueError(f"advantage.strength must be > 0, got {strength}")
        self.strength, self.base = strength, base

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return LOG_PROBS if self.strength == 1 else LOG_PROBS | {f"{self.base}/log_prob"}

    def __call__(self, steps: Steps) -> Tensor:
        ratio = log_ratio(steps)
        if self.strength == 1:
            return ratio
        beyond = steps.statistic("teacher/log_prob") - steps.statistic(f"{self.base}/log_prob")
        return torch.where(steps.knows(self.base), ratio + (self.strength - 1) * beyond, ratio)


class Preference(Advantage):
    """Advantage ±β·σ(−m), with which a plain policy gradient descends −log σ(m) of pairs (PBSD, 2605.05040).

    m = β·(Σ_t log p(y⁺)/q(y⁺) − Σ_t log p(y⁻)/q(y⁻)), + for the steps of y⁺, − for those of y⁻. In each group the
    trajectories of the preferred policy are paired with the others, in their order; who has no partner is not trained.
    σ(−m) is that of the student as it was when the generation batch was rolled out. To be used with
    ``PolicyGradient(ratio: none, clip: null)``.

    Args:
        beta: β, default 0.1 (ours: PBSD's was not found).
        preferred: the policy whose trajectories are y⁺, an entry of ``model.teachers``.
    """

    needs = frozenset({"teacher", "group"})
    reads = LOG_PROBS
    scope: Scope = "generation"

    def __init__(self, beta: float = 0.1, preferred: str = "teacher") -> None:
        if beta <= 0:
            raise ValueError(f"advantage.beta must be > 0, got {beta}")
        self.beta, self.preferred = beta, preferred

    def settle(self, generation: Generation) -> Tensor:
        # 1. how far each trajectory is from the teacher
        batch = generation.trajectories
        away = -generation.rows(log_ratio(generation.steps))
        known = generation.on & ~away.isnan()
        away = torch.where(known, away, 0.0).sum(1)
        # 2. pairs, and how strongly each is still to be pulled apart
        place = batch.sources.index(self.preferred) if self.preferred in batch.sources else -1
        is_preferred, pull = batch.source == place, torch.zeros_like(away)
        for group in batch.group.unique():
            here = known.any(1) & (batch.group == group)
            better = (here & is_preferred).nonzero().squeeze(-1)
            worse = (here & ~is_preferred).nonzero().squeeze(-1)
            count = min(len(better), len(worse))
            margin = self.beta * (away[better[:count]] - away[worse[:count]])
            pull[better[:count]] = self.beta * (-margin).sigmoid()
            pull[worse[:count]] = -self.beta * (-margin).sigmoid()
        return torch.where(known, pull[:, None], 0.0)
