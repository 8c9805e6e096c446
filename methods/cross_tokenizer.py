"""Signals that compare the student with a teacher over the teacher's own vocabulary.

Shape legend: n steps of a chunk, V and W ids of the student and of the teacher, M that both have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distribution import CategoricalChunk
from ..objective.divergence import jsd_terms
from ..objective.signal import Signal
from ..objective.steps import OpenSteps


def sorted_distance(p: Tensor, q: Tensor) -> Tensor:
    """Returns Σ_i |p_(i) − q_(i)| ``[n]`` of ``[n, V]`` and ``[n, W]`` in descending order; what is missing is 0."""
    size = max(p.shape[-1], q.shape[-1])
    ordered = (F.pad(side.sort(-1, descending=True).values, (0, size - side.shape[-1])) for side in (p, q))
    one, other = ordered
    return (one - other).abs().sum(-1)


class ULD(Signal):
    """Distance Σ_i |p_(i) − q_(i)| of the probabilities in descending order, whatever their ids write (2402.12030).

    The smaller vocabulary is filled up with zeros. 0 where the teacher has no state beside the student's
    (`OtherTokenizer`).

    Args:
        temperature: both sides' logits are divided by it. Default 1 (ULD's code).

    Raises:
        ValueError: temperature not positive.
    """

    needs = frozenset({"teacher", "categorical", "other_tokenizer"})

    def __init__(self, temperature: float = 1.0) -> None:
        if temperature <= 0:
            raise ValueError(f"signal.temperature must be > 0, got {temperature}")
        self.temperature = temperature

    def __call__(self, steps: OpenSteps) -> Tensor:
        assert isinstance(steps.student, CategoricalChunk)
        p, (_, q) = steps.student.log_probs(self.temperature).exp(), steps.teacher.own.known(self.temperature)
        return torch.where(steps.teacher.paired, sorted_distance(p, q), 0.0)


class HybridULD(Signal):
    """JSD over the ids of both vocabularies that write the same, and `ULD` over all others (GOLD, TRL).

    Both sides' probabilities at the beginning of a chunk are multiplied by those of its later tokens, the student's as
    it acted and without gradient. 0 where no chunk begins, or none that the teacher can judge.

    Args:
        beta: of the JSD, as in `JSD`. Default 0.5 (GOLD).
        share: weight of the JSD; that of the distance is 1 − share. None (default, GOLD): the share of the teacher's
            ids that the student has, too.

    Raises:
        ValueError: a number that is not in [0, 1].
    """

    needs = frozenset({"teacher", "categorical", "other_tokenizer", "behavior"})

    def __init__(self, beta: float = 0.5, share: float | None = None) -> None:
        if not 0 <= beta <= 1 or not (share is None or 0 <= share <= 1):
            raise ValueError(f"signal.beta and share must be in [0, 1], got {beta} and {share}")
        self.beta, self.share = beta, share

    def __call__(self, steps: OpenSteps) -> Tensor:
        assert isinstance(steps.student, CategoricalChunk)
        teacher = steps.teacher
        # a chunk has a beginning alone: elsewhere the rest is not known
        rest = torch.where(teacher.paired[:, None], teacher.rest, 0.0)
        log_p, log_q = steps.student.log_probs() + rest[:, :1], teacher.own.known()[0] + rest[:, 1:]
        own, other = teacher.matched
        share = len(other) / log_q.shape[-1] if self.share is None else self.share
        loss = share * jsd_terms(log_p[:, own], log_q[:, other], self.beta).sum(-1)
        left, others = (side[:, _without(ids, side.shape[-1])] for side, ids in ((log_p, own), (log_q, other)))
        if left.shape[-1] and others.shape[-1]:  # where one side has none, GOLD compares nothing
            loss = loss + (1 - share) * sorted_distance(left.exp(), others.exp())
        return torch.where(teacher.paired, loss, 0.0)


def _without(ids: Tensor, vocabulary: int) -> Tensor:
    """Lists the ids of a vocabulary that are not among some."""
    is_left = torch.ones(vocabulary, dtype=torch.bool, device=ids.device)
    is_left[ids] = False
    return is_left.nonzero().squeeze(-1)
