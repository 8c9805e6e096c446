"""ChangePoint: only what comes before a lasting drop of the teacher's margin is trained."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ...distribution import CategoricalChunk
from ...module import OnPolicyDistillation
from ...objective.steps import OpenSteps
from ...trajectory import Trajectories
from .rule import StopRule


class ChangePoint(StopRule):
    """Prefix Teach, Suffix Fade (2605.13643): only what comes before a lasting drop of the teacher's margin is trained.

    Means over blocks of steps are split in two where that explains them best; the split counts if the Bayesian
    information criterion prefers it, n·log(RSS₁/n) + 3·log n < n·log(RSS₀/n) + log n for n blocks, and the mean falls.
    The paper averages over sentences, which other settings don't have, and its formula of the margin is not public:
    here it is the difference between the teacher's two largest probabilities among the student's top k. The criterion
    is that of an independent re-implementation.

    The rollout is generated in full, and asks student and teacher once more.

    Args:
        signal: ``margin``; or the teacher's ``confidence``, max q, whose decay is what "Supervision Fidelity Decay"
            (2605.30833) reports; or ``log_prob``, log q of the step taken, which also continuous steps have.
        block: steps per block. Default 16.
        candidates: k of the margin. Default 16.
        fewest: blocks on either side of a split. Default 3.
        teacher: an entry of ``model.teachers``.

    Raises:
        ValueError: a value out of range; when training begins, a teacher or a vocabulary that the run doesn't have.
    """

    def __init__(
        self,
        signal: Literal["margin", "confidence", "log_prob"] = "margin",
        block: int = 16,
        candidates: int = 16,
        fewest: int = 3,
        teacher: str = "teacher",
    ) -> None:
        if min(block, fewest) < 1 or candidates < 2:
            raise ValueError(
                f"ChangePoint: block={block} and fewest={fewest} must be >= 1, candidates={candidates} >= 2"
            )
        if signal not in ("margin", "confidence", "log_prob"):
            raise ValueError(f"ChangePoint.signal is margin, confidence or log_prob, not {signal!r}")
        self.signal, self.block, self.candidates, self.fewest = signal, block, candidates, fewest
        self.teacher = teacher
        self.reads_distribution = signal != "log_prob"

    def begin(self, module: OnPolicyDistillation, longest: int) -> None:
        if self.signal != "log_prob" and "categorical" not in module.provides:
            raise ValueError(
                f"ChangePoint.signal={self.signal} needs a vocabulary, which this setting doesn't have; use log_prob"
            )

    def keep(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Tensor:
        values = module.per_step(trajectories, self._read, self.teacher)
        rows = zip(values, trajectories.mask, trajectories.length.tolist(), strict=True)
        return torch.tensor([self._cut(row[mask], length) for row, mask, length in rows])

    def _read(self, steps: OpenSteps) -> Tensor:
        if self.signal != "margin":
            return steps.statistic("teacher/peak" if self.signal == "confidence" else "teacher/log_prob")
        assert isinstance(steps.student, CategoricalChunk)
        log_p = steps.student.log_probs()
        candidates = log_p.topk(min(self.candidates, log_p.shape[-1])).indices
        best = steps.teacher.log_probs().gather(-1, candidates).exp().topk(2).values
        return best[:, 0] - best[:, 1]

    def _cut(self, values: Tensor, length: int) -> int:
        """Steps before the change point of ``values [n]``; all of them if there is none."""
        # the teacher is not defined here
        if values.isnan().any():
            return length
        blocks = torch.stack([part.mean() for part in values.double().split(self.block)]) if length else values
        split = falls_at(blocks, self.fewest)
        return length if split is None else split * self.block


def falls_at(values: Tensor, fewest: int) -> int | None:
    """Counts the ``values [n]`` before a single step down that BIC accepts; None: there is none.

    Args:
        fewest: values on either side of the step.
    """
    n = len(values)
    if n < 2 * fewest:
        return None
    splits = torch.arange(fewest, n - fewest + 1)
    total, squares = values.cumsum(0), values.square().cumsum(0)
    before, after = total[splits - 1] / splits, (total[-1] - total[splits - 1]) / (n - splits)
    flat = squares[-1] - total[-1].square() / n
    stepped = squares[-1] - splits * before.square() - (n - splits) * after.square()
    best = int(stepped.argmin())
    least = 1e-12 * float(squares[-1]) + 1e-30  # rounding leaves no more than this of a perfect fit

    def bic(rss: Tensor, parameters: int) -> float:
        return n * math.log(max(float(rss), least) / n) + parameters * math.log(n)

    accepted = before[best] > after[best] and bic(stepped[best], 3) < bic(flat, 1)
    return int(splits[best]) if accepted else None
