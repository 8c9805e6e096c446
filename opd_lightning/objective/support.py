"""Supports: the part of the vocabulary on which student and teacher are compared, and what happens to the rest.

Shape legend: n states, V vocabulary, K support size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..distribution import IMPOSSIBLE


@dataclass(frozen=True)
class Support:
    """Support of a divergence over a vocabulary.

    Args:
        of: ``full`` vocabulary; the ``teacher``'s or the ``student``'s k likeliest ids; their ``union``; or the
            ``sampled`` id alone.
        k: number of ids (for ``union``, of each side). Required for teacher, student and union.
        remainder: ``tail`` adds one bucket with all other probability, so the result is a divergence between
            coarser distributions: never negative, exact at k = V, zero gradient at student = teacher. ``renormalize``
            rescales both sides to the support. ``drop`` leaves the sum truncated: it can be negative and pulls even
            an equal student away from the teacher.

    Raises:
        ValueError: k missing, not positive, or given where nothing reads it.
    """

    of: Literal["full", "teacher", "student", "union", "sampled"] = "full"
    k: int | None = None
    remainder: Literal["tail", "renormalize", "drop"] = "tail"

    def __post_init__(self) -> None:
        ranked = self.of in ("teacher", "student", "union")
        if ranked and (self.k is None or self.k < 1):
            raise ValueError(f"support.k: a support of '{self.of}' needs k >= 1, got {self.k}")
        if not ranked and self.k is not None:
            raise ValueError(f"support.k: a support of '{self.of}' takes no k, got {self.k}")
        if self.of == "full" and self.remainder != "tail":
            raise ValueError(f"support.remainder: the full vocabulary leaves nothing to {self.remainder}")
        if self.of == "sampled" and self.remainder == "renormalize":
            raise ValueError("support.remainder: one sampled id renormalizes to probability 1 on both sides")

    def is_full(self, vocabulary: int) -> bool:
        """Tells whether it holds all of so many ids."""
        return self.of == "full" or (self.k is not None and self.k >= vocabulary)

    def restrict(self, student: Tensor, teacher: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Restricts log-probs ``[n, V]`` of both sides to the support: ``[n, K]``, or with a tail ``[n, K+1]``."""
        ids, repeated = self._ids(student, teacher, action)
        if ids is None:
            return student, teacher
        return self._gather(student, ids, repeated), self._gather(teacher, ids, repeated)

    def _ids(self, student: Tensor, teacher: Tensor, action: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Selects ids ``[n, K]`` (None: all) and marks duplicates among them ``[n, K]`` bool (None: there are none)."""
        if self.is_full(student.shape[-1]):
            return None, None
        if self.of == "sampled":
            return action[:, None], None
        assert self.k is not None
        if self.of == "teacher":
            return teacher.topk(self.k).indices, None
        if self.of == "student":
            return student.topk(self.k).indices, None
        # sorted, so that an id of both sides has its duplicate beside it
        ids = torch.cat([teacher.topk(self.k).indices, student.topk(self.k).indices], -1).sort(-1).values
        repeated = torch.zeros_like(ids, dtype=torch.bool)
        repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
        return ids, repeated

    def _gather(self, log_probs: Tensor, ids: Tensor, repeated: Tensor | None) -> Tensor:
        selected = log_probs.gather(-1, ids)
        if repeated is not None:
            selected = selected.masked_fill(repeated, IMPOSSIBLE)
        if self.remainder == "drop":
            return selected
        if self.remainder == "renormalize":
            return selected.log_softmax(-1)
        # Summing what is left is exact where 1 − Σ would be rounding noise; a support that holds all leaves IMPOSSIBLE.
        rest = log_probs.scatter(-1, ids, IMPOSSIBLE).logsumexp(-1, keepdim=True)
        return torch.cat([selected, rest.clamp(min=IMPOSSIBLE)], -1)
