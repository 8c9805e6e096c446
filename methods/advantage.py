"""Advantages of single papers. δ = log q(y) − log p(y) at the sampled action, A the group-relative reward.

Shape legend: n steps of a chunk, N of a micro-batch, B trajectories of T steps.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..objective.advantage import LOG_PROBS, Advantage, GroupRelative, LogRatio, TeacherShare, log_ratio
from ..objective.generation import Generation
from ..objective.signal import Scope
from ..objective.steps import STATISTICS, OpenSteps, Steps

EPSILON = 1e-6
"""Added to what is divided by, as in GRPO; single papers print none."""


class RewardMinusPMI(TeacherShare):
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

    def __call__(self, steps: Steps) -> Tensor:
        advantage = super().__call__(steps)
        if not self.share:
            return advantage
        return advantage - self.share * (softplus(log_ratio(steps)) - math.log(2)) / 2


class DirectionAdaptive(GroupRelative):
    """Advantage A + β·ω·ē: towards the teacher where the student is certain, away from it elsewhere (DASD, 2605.22263).

    ē = δ / median |δ| and ω = tanh((τ − H) / σ_H)·σ(|ē| − 1), over the trained steps of a trajectory: H the student's
    entropy, τ its quantile, σ_H its mean absolute deviation, σ the logistic function.

    Args:
        coefficient: β, default 0.1 (ours: DASD prints none).
        quantile: of the entropies, below which steps are attracted. Default 0.2 (DASD).
        scale: as in `GroupRelative`.
    """

    scope: Scope = "row"

    def __init__(self, coefficient: float = 0.1, quantile: float = 0.2, scale: bool = True) -> None:
        super().__init__(scale)
        if not 0 <= quantile <= 1:
            raise ValueError(f"advantage.quantile must be in [0, 1], got {quantile}")
        self.coefficient, self.quantile = coefficient, quantile

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return GroupRelative.needs | ({"teacher"} if self.coefficient else frozenset())

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return LOG_PROBS | {"student/entropy"} if self.coefficient else frozenset()

    def __call__(self, steps: Steps) -> Tensor:
        advantage = super().__call__(steps)
        if not self.coefficient:
            return advantage
        ratio, entropy = log_ratio(steps), steps.statistic("student/entropy")
        pull = torch.zeros_like(ratio)
        for row in steps.trajectory.unique():
            here = steps.trajectory == row
            gap = ratio[here] / (ratio[here].abs().quantile(0.5) + EPSILON)
            certain = entropy[here].quantile(self.quantile) - entropy[here]
            deviation = (entropy[here] - entropy[here].mean()).abs().mean()
            pull[here] = (certain / (deviation + EPSILON)).tanh() * (gap.abs() - 1).sigmoid() * gap
        return advantage + self.coefficient * pull


class FDivergence(Advantage):
    """Advantage −f(u) + u·f′(u) with u = q(y)/p(y): the exact policy gradient of E_p f(u) (OPD+, 2606.01039).

    A reward −f(u) is that of the reverse KL alone. Only the step's own, as in the paper.

    Args:
        divergence: ``reverse_kl``: log u − 1. ``forward_kl``: u. ``jsd`` (default): ½·log((1 + u)/2).
    """

    needs = frozenset({"teacher"})
    reads = LOG_PROBS

    def __init__(self, divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "jsd") -> None:
        if divergence not in ("reverse_kl", "forward_kl", "jsd"):
            raise ValueError(f"advantage.divergence is reverse_kl, forward_kl or jsd, not {divergence!r}")
        self.divergence = divergence

    def __call__(self, steps: Steps) -> Tensor:
        ratio = log_ratio(steps)
        if self.divergence == "reverse_kl":
            return ratio - 1
        if self.divergence == "forward_kl":
            # bounded, so that one step that the student thought impossible cannot overflow
            return ratio.clamp(max=20).exp()
        return (softplus(ratio) - math.log(2)) / 2


class Whitened(Advantage):
    """Advantage (x − mean) / standard deviation over the generation batch (GNDPO, 2606.09091).

    Mean and deviation are those of all trained steps where the term is on, on all ranks.

    Args:
        of: the advantage x, such as `LogRatio`; not one with a baseline, which reads whole distributions.
        clip: bound on |x| before. Default 5 (GNDPO's code). None: no bound.
        floor: smallest deviation that is divided by: near the end all x are alike, and noise would be blown up. Default
            0.01 (ours; GNDPO has none).

    Raises:
        ValueError: a number that is not positive, or an advantage that can't be settled.
    """

    scope: Scope = "generation"

    def __init__(self, of: Advantage, clip: float | None = 5.0, floor: float = 0.01) -> None:
        if (clip is not None and clip <= 0) or floor <= 0:
            raise ValueError(f"advantage: clip and floor must be > 0, got {clip} and {floor}")
        if isinstance(of, LogRatio) and of.baseline is not None:
            raise ValueError("advantage.of: a baseline reads whole distributions, which are not kept so long")
        self.of, self.clip, self.floor = of, clip, floor

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.of.needs

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return self.of.reads

    def settle(self, generation: Generation) -> Tensor:
        values = self.of.over(generation)
        if self.clip is not None:
            values = values.clamp(-self.clip, self.clip)
        known = generation.on & ~values.isnan()
        return torch.where(known, whitened(values, generation.everywhere(values[known]), self.floor), 0.0)


class Belief(GroupRelative):
    """Advantage sign(A)·|σ(ℓ + δ) − σ(ℓ)|: how much a step moves the belief in success (OPPO, 2605.21851).

    ℓ is the log-odds of success before the step: log((k + a)/(G − k + a)) for k of G right in the group, plus the δ of
    the steps before. The teacher is the same model, shown the answer. Divided by mean and deviation over the group's
    steps; where a whole group is right or wrong it is 0.

    Args:
        clip: bound on |δ|, default 3 (OPPO).
        prior: a, default 1 (OPPO).
    """

    needs = GroupRelative.needs | {"teacher"}
    reads = LOG_PROBS
    scope: Scope = "generation"

    def __init__(self, clip: float = 3.0, prior: float = 1.0) -> None:
        super().__init__()
        if min(clip, prior) <= 0:
            raise ValueError(f"advantage: clip and prior must be > 0, got {clip} and {prior}")
        self.clip, self.prior = clip, prior

    def settle(self, generation: Generation) -> Tensor:
        # 1. belief before and after each step
        batch, steps = generation.trajectories, generation.steps
        assert batch.group_mean is not None
        evidence = generation.rows(log_ratio(steps)).clamp(-self.clip, self.clip)
        known = generation.on & ~evidence.isnan()
        evidence = torch.where(known, evidence, 0.0)
        _, member = batch.group.unique(return_inverse=True)
        size = member.bincount(generation.on.any(1).float())[member]  # those whose reward does not abstain
        right = batch.group_mean.nan_to_num() * size
        prior = ((right + self.prior) / (size - right + self.prior)).log()
        after = prior[:, None] + evidence.cumsum(1)
        gain = (after.sigmoid() - (after - evidence).sigmoid()).abs()
        # 2. the verifier's sign, and one scale for each group
        advantage = generation.rows(super().__call__(steps)).sign() * gain
        scaled = torch.zeros_like(advantage)
        for group in member.unique():
            here = known & (member == group)[:, None]
            if bool(advantage[here].any()):
                scaled[here] = whitened(advantage[here], advantage[here], EPSILON)
        return scaled


class Calibrated(Advantage):
    """Advantage δ + a shift, so that the teacher ranks right rollouts above wrong ones (Uni-OPD, 2605.03677).

    In a group, gap = the mean δ of the right ones − that of the wrong ones. If gap < margin, the difference is made up:
    half of it is added at all steps of the right ones, half taken off at those of the wrong ones. Where a group has but
    one kind, nothing is shifted.

    Args:
        margin: default 0.4 (Uni-OPD).
        statistic: of the rollouts' mean δ: ``mean`` (default, Uni-OPD), or ``extreme``, the lowest of the right ones
            and the highest of the wrong ones.
        shift: ``both`` (default, Uni-OPD), or ``right`` or ``wrong`` alone, by all of the difference.
        clip: bound on |δ|. Default 10 (ours; Uni-OPD's was not found).
    """

    needs = GroupRelative.needs | {"teacher"}
    reads = LOG_PROBS
    scope: Scope = "generation"

    def __init__(
        self,
        margin: float = 0.4,
        statistic: Literal["mean", "extreme"] = "mean",
        shift: Literal["both", "right", "wrong"] = "both",
        clip: float = 10.0,
    ) -> None:
        if statistic not in ("mean", "extreme") or shift not in ("both", "right", "wrong") or clip <= 0:
            raise ValueError(
                "advantage: statistic is mean or extreme, shift both, right or wrong, clip > 0; "
                f"got {statistic!r}, {shift!r} and {clip}"
            )
        self.margin, self.statistic, self.shift, self.clip = margin, statistic, shift, clip

    def settle(self, generation: Generation) -> Tensor:
        steps = generation.steps
        ratio = generation.rows(log_ratio(steps)).clamp(-self.clip, self.clip)
        known = generation.on & ~ratio.isnan()
        ratio = torch.where(known, ratio, 0.0)
        means = ratio.sum(1) / known.sum(1).clamp(min=1)
        assert generation.trajectories.reward is not None
        is_right, counts = generation.trajectories.reward >= 0.5, known.any(1)
        shift = torch.zeros_like(means)
        for group in generation.trajectories.group.unique():
            here = counts & (generation.trajectories.group == group)
            right, wrong = means[here & is_right], means[here & ~is_right]
            if not len(right) or not len(wrong):
                continue
            is_mean = self.statistic == "mean"
            gap = right.mean() - wrong.mean() if is_mean else right.min() - wrong.max()
            missing = (self.margin - gap).clamp(min=0) / (2 if self.shift == "both" else 1)
            if self.shift != "wrong":
                shift[here & is_right] = missing
            if self.shift != "right":
                shift[here & ~is_right] = -missing
        return torch.where(known, ratio + shift[:, None], 0.0)


def renormalized_gain(teacher: Any, steps: OpenSteps, k: int) -> Tensor:
    """Returns log q̄(y) − log p̄(y) ``[n]``, both renormalized over the teacher's k likeliest ids and y."""
    log_p, log_q = steps.student.known()[0], teacher.known()[0]  # type: ignore[union-attr]
    ids, action = log_q.topk(min(k, log_q.shape[-1])).indices, steps.action[:, None]
    is_among = (ids == action).any(-1, keepdim=True)

    def renormalized(log_probs: Tensor) -> Tensor:
        sampled = log_probs.gather(-1, action)
        support = torch.cat([log_probs.gather(-1, ids), sampled.masked_fill(is_among, -torch.inf)], -1)
        return sampled[:, 0] - support.logsumexp(-1)

    return renormalized(log_q) - renormalized(log_p)


class Judged(GroupRelative):
    """Advantage A·[(1−λ) + λ·clip(exp(sign(A)·r), 1−ε, 1+ε)] where a judge has spoken, A elsewhere (VISD, 2605.06094).

    r = (1−γ)·r_k + γ·δ, where r_k is δ with both sides renormalized over the teacher's k likeliest ids and the sampled
    one. The teacher is an entry of ``model.teachers`` whose view shows the feedback. The term itself names no teacher,
    so that it is on, and its normalizer counts, where nobody was judged.

    Args:
        teacher: that entry, of another name than ``teacher``, which stands for a term's own. Default ``judged``.
        share: λ, default 0.5 (VISD, which takes it to 0 over 600 steps). At 0 no teacher is asked.
        clip: ε, default 0.2 (VISD).
        k: default 16 (VISD).
        full: γ, the share of δ over the full vocabulary. Default 0 (VISD).
        scale: as in `GroupRelative`.

    Raises:
        ValueError: a number out of range, or that name.
    """

    scope: Scope = "step"

    def __init__(
        self,
        teacher: str = "judged",
        share: float = 0.5,
        clip: float = 0.2,
        k: int = 16,
        full: float = 0.0,
        scale: bool = True,
    ) -> None:
        super().__init__(scale)
        if teacher == "teacher":
            raise ValueError("advantage.teacher: 'teacher' stands for a term's own; give the entry another name")
        if not (0 <= share <= 1 and 0 < clip <= 1 and k >= 1 and 0 <= full <= 1):
            raise ValueError(
                "advantage: share and full must be in [0, 1], clip in (0, 1], k >= 1; "
                f"got {share}, {full}, {clip} and {k}"
            )
        self.teacher, self.share, self.clip, self.k, self.full = teacher, share, clip, k, full
        STATISTICS[f"renormalized_gain_{k}"] = partial(renormalized_gain, k=k)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return GroupRelative.needs | ({"categorical"} if self.share else frozenset())

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        if not self.share:
            return frozenset()
        full = {f"{self.teacher}/log_prob", "student/log_prob"} if self.full else set()
        return frozenset({f"{self.teacher}/renormalized_gain_{self.k}"} | full)

    def __call__(self, steps: Steps) -> Tensor:
        advantage = super().__call__(steps)
        if not self.share:
            return advantage
        gain = steps.statistic(f"{self.teacher}/renormalized_gain_{self.k}")
        if self.full:
            plain = steps.statistic(f"{self.teacher}/log_prob") - steps.statistic("student/log_prob")
            gain = (1 - self.full) * gain + self.full * plain
        # the exponent is bounded before exp, so that one impossible step cannot overflow
        factor = (advantage.sign() * gain).clamp(-20, 20).exp().clamp(1 - self.clip, 1 + self.clip)
        judged = advantage * ((1 - self.share) + self.share * factor)
        return torch.where(steps.knows(self.teacher), judged, advantage)


class Unit(Advantage):
    """Advantage 1: every sampled step becomes likelier (SCOPE, 2604.10688, for right rollouts)."""

    scope: Scope = "data"

    def __call__(self, steps: Steps) -> Tensor:
        return torch.ones(len(steps), device=steps.index.device)


def whitened(values: Tensor, among: Tensor, floor: float) -> Tensor:
    """Returns values minus the mean of ``among [M]``, divided by its (population) deviation, or by ``floor``."""
    if not len(among):
        return torch.zeros_like(values)
    centered = among.double() - among.double().mean()
    deviation = centered.square().mean().sqrt().clamp(min=floor)
    return ((values - among.double().mean()) / deviation).to(values.dtype)
