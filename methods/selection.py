"""Weights of 0 and 1: which steps and trajectories are trained at all. What is left out is never projected.

Shape legend: n steps of a chunk, B trajectories of T steps of a generation batch, M steps of all ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..finite import Finite
from ..objective.advantage import LOG_PROBS
from ..objective.divergence import forward_kl_terms
from ..objective.generation import Generation
from ..objective.signal import Scope
from ..objective.steps import STATISTICS, OpenSteps
from ..objective.support import Support
from ..objective.weight import Weight


def reverse_kl(teacher: Any, steps: OpenSteps) -> Tensor:
    """Returns KL(student‖teacher) ``[n]`` over the full vocabulary."""
    log_p, p = steps.student.known()  # type: ignore[union-attr]
    return (p * (log_p - teacher.known()[0])).sum(-1)


STATISTICS["reverse_kl"] = reverse_kl


class Score(Finite, ABC):
    """Score of every step, by which `KeepTop` chooses. ``reads`` are the statistics that it is made of."""

    reads: frozenset[str] = frozenset()

    @abstractmethod
    def __call__(self, generation: Generation, known: Tensor) -> Tensor:
        """Returns the scores ``[B, T]``; ``known`` ``[B, T]`` bool says where there are any."""


def rescaled(generation: Generation, name: str, known: Tensor, low: float, high: float) -> Tensor:
    """Brings a statistic ``[B, T]`` to [0, 1] between two of its quantiles over all ranks; 0 where they are equal."""
    values = generation.statistics[name]
    everywhere = generation.everywhere(values[known]).float()
    if not len(everywhere):
        return torch.zeros_like(values)
    start, stop = everywhere.quantile(low), everywhere.quantile(high)
    return ((values - start) / (stop - start).clamp(min=1e-12)).clamp(0, 1)


class SoftOr(Score):
    """Score ĥ + δ̂ − ĥ·δ̂: the student is puzzled, or disagrees with the teacher (TIP, 2604.14084).

    h is the student's entropy, δ = KL(student‖teacher), both brought to [0, 1] by minimum and maximum over the
    generation batch, h after its highest 2 % were cut.
    """

    reads = frozenset({"student/entropy", "teacher/reverse_kl"})

    def __call__(self, generation: Generation, known: Tensor) -> Tensor:
        puzzled = rescaled(generation, "student/entropy", known, 0.0, 0.98)
        apart = rescaled(generation, "teacher/reverse_kl", known, 0.0, 1.0)
        return puzzled + apart - puzzled * apart


class Teachability(Score):
    """Score D̃·C̃: the teacher disagrees, and its mass lies where the student could follow (TA-OPD, 2605.26844).

    D = KL(q̄‖p̄) on the union of both sides' k likeliest ids, renormalized; C is the teacher's mass on the student's k.
    Each is brought to [0, 1] between its 5 % and 95 % quantiles over the generation batch.

    Args:
        k: default 16 (TA-OPD).

    Raises:
        ValueError: k below 1.
    """

    def __init__(self, k: int = 16) -> None:
        if k < 1:
            raise ValueError(f"score.k must be >= 1, got {k}")
        self.k = k
        STATISTICS[f"disagreement_{k}"] = partial(disagreement, k=k)
        STATISTICS[f"reachable_{k}"] = partial(reachable, k=k)
        self.reads = frozenset({f"teacher/disagreement_{k}", f"teacher/reachable_{k}"})

    def __call__(self, generation: Generation, known: Tensor) -> Tensor:
        apart = rescaled(generation, f"teacher/disagreement_{self.k}", known, 0.05, 0.95)
        return apart * rescaled(generation, f"teacher/reachable_{self.k}", known, 0.05, 0.95)


def disagreement(teacher: Any, steps: OpenSteps, k: int) -> Tensor:
    """Returns KL(teacher‖student) ``[n]`` on the union of their k likeliest ids, renormalized."""
    log_p, log_q = steps.student.known()[0], teacher.known()[0]  # type: ignore[union-attr]
    support = Support("union", k, "renormalize")
    return forward_kl_terms(*support.restrict(log_p, log_q, steps.action)).sum(-1)


def reachable(teacher: Any, steps: OpenSteps, k: int) -> Tensor:
    """Returns the teacher's mass ``[n]`` on the student's k likeliest ids."""
    p, q = steps.student.known()[1], teacher.known()[1]  # type: ignore[union-attr]
    return q.gather(-1, p.topk(min(k, p.shape[-1])).indices).sum(-1)


class Gap(Score):
    """Score |log q(y) − log p(y)|: where what the teacher was shown matters (GenEvolve, 2605.21605)."""

    reads = LOG_PROBS

    def __call__(self, generation: Generation, known: Tensor) -> Tensor:
        return (generation.statistics["teacher/log_prob"] - generation.statistics["student/log_prob"]).abs()


class KeepTop(Weight):
    """Weight 1 for the steps with the highest scores, 0 elsewhere.

    With ``normalizer: weights`` the loss is the mean over what is kept, as in the papers. Steps of equal scores are
    kept or left out together.

    Args:
        score: `SoftOr` (default; TIP, 2604.14084), `Teachability` (TA-OPD, 2605.26844) or `Gap`.
        share: ρ that is kept. Default 0.5 (TIP, which also uses 0.2 and 0.1).
        per: ``trajectory`` (default): the ⌊ρm⌋ highest of its m steps, one at least. ``batch``: the ⌈ρn⌉ highest of
            the generation batch's n, on all ranks.

    Raises:
        ValueError: a share that is not in (0, 1].
    """

    needs = frozenset({"teacher", "categorical"})
    scope: Scope = "generation"

    def __init__(
        self, score: Score | None = None, share: float = 0.5, per: Literal["trajectory", "batch"] = "trajectory"
    ) -> None:
        if not 0 < share <= 1 or per not in ("trajectory", "batch"):
            raise ValueError(f"weight: share must be in (0, 1] and per trajectory or batch, got {share} and {per!r}")
        self.score, self.share, self.per = score or SoftOr(), share, per

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return self.score.reads

    def settle(self, generation: Generation) -> Tensor:
        known = generation.on.clone()
        for name in self.reads:
            known &= ~generation.statistics[name].isnan()
        scores = self.score(generation, known)
        kept = torch.zeros_like(known)
        if self.per == "batch":
            everywhere = generation.everywhere(scores[known])
            if len(everywhere):
                kept = known & (scores >= highest(everywhere, math.ceil(self.share * len(everywhere) - 1e-9)))
        else:
            for row, here in enumerate(known):
                count = max(1, math.floor(self.share * int(here.sum()) + 1e-9))
                if here.any():
                    kept[row] = here & (scores[row] >= highest(scores[row][here], count))
        return kept.float()


def highest(values: Tensor, count: int) -> Tensor:
    """Returns the ``count``-th highest of ``values [M]``."""
    return values.kthvalue(len(values) - count + 1).values


class KeepLikeliest(Weight):
    """Weight 1 for the trajectories that the teacher finds likeliest, by its mean log q(y), 0 for the others.

    FiRe-OPD (2606.02684). The percentile is that of the generation batch on all ranks; in the paper's release it is
    taken within micro-batches, where one of a single trajectory drops nothing.

    Args:
        share: that is kept, default 0.8 (FiRe-OPD).

    Raises:
        ValueError: a share that is not in (0, 1].
    """

    needs = frozenset({"teacher"})
    reads = frozenset({"teacher/log_prob"})
    scope: Scope = "generation"

    def __init__(self, share: float = 0.8) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"weight.share must be in (0, 1], got {share}")
        self.share = share

    def settle(self, generation: Generation) -> Tensor:
        log_prob = generation.statistics["teacher/log_prob"]
        known = generation.on & ~log_prob.isnan()
        means = torch.where(known, log_prob, 0.0).sum(1) / known.sum(1).clamp(min=1)
        everywhere = generation.everywhere(means[known.any(1)])
        limit = everywhere.quantile(1 - self.share) if len(everywhere) else torch.tensor(0.0)
        return (known & (means >= limit)[:, None]).float()
