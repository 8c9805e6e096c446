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
        of: ``full`` vocabulary; the ``teacher``'s or the ``student``'s k likeliest ids; their ``union``,
            ``intersection`` or (symmetric) ``difference`` (2604.13016, where intersections do as well as the
            student's k and differences worse); the ``sampled`` id alone; or given ``ids`` (SafeSteer, 2606.02530).
        k: number of ids, of each side. Required where ids are ranked.
        remainder: ``tail`` adds one bucket with all other probability, so the result is a divergence between
            coarser distributions: never negative, exact at k = V, zero gradient at student = teacher. ``renormalize``
            rescales both sides to the support. ``drop`` leaves the sum truncated: it can be negative and pulls even
            an equal student away from the teacher. ``stop``, for the reverse KL alone, drops it, too, but leaves log p
            in Σ p·(log p − log q) without gradient, so that an equal student stays where it is (2605.11182).
        ids: of the vocabulary, for ``ids``.

    Raises:
        ValueError: k or ids missing, not positive, or given where nothing reads them.
    """

    of: Literal["full", "teacher", "student", "union", "intersection", "difference", "sampled", "ids"] = "full"
    k: int | None = None
    remainder: Literal["tail", "renormalize", "drop", "stop"] = "tail"
    ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        ranked = self.of in ("teacher", "student", "union", "intersection", "difference")
        if self.ids is not None:  # a list, in YAML
            object.__setattr__(self, "ids", tuple(self.ids))
        if (self.of == "ids") != bool(self.ids) or len(set(self.ids or ())) != len(self.ids or ()):
            raise ValueError(f"support.ids: different ids for a support of 'ids' and no other, got {self.ids}")
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
        return self.of == "full" or (self.of != "difference" and self.k is not None and self.k >= vocabulary)

    def restrict(self, student: Tensor, teacher: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Restricts log-probs ``[n, V]`` of both sides to the support: ``[n, K]``, or with a tail ``[n, K+1]``."""
        if self.is_full(student.shape[-1]):
            return student, teacher
        ids, omitted = self._ids(student, teacher, action)
        return self._gather(student, ids, omitted), self._gather(teacher, ids, omitted)

    def _ids(self, student: Tensor, teacher: Tensor, action: Tensor) -> tuple[Tensor, Tensor | None]:
        """Selects ids ``[n, K]`` and marks those that don't count ``[n, K]`` bool (None: all do)."""
        if self.of == "sampled":
            return action[:, None], None
        if self.of == "ids":
            return torch.tensor(self.ids, device=action.device).expand(len(action), -1), None
        k = min(self.k or 0, student.shape[-1])
        if self.of == "teacher":
            return teacher.topk(k).indices, None
        if self.of == "student":
            return student.topk(k).indices, None
        of_student, of_teacher = student.topk(k).indices, teacher.topk(k).indices
        if self.of == "intersection":
            return of_student, (of_student[:, :, None] != of_teacher[:, None]).all(-1)
        # sorted, so that an id of both sides has its duplicate beside it
        ids = torch.cat([of_teacher, of_student], -1).sort(-1).values
        second = torch.zeros_like(ids, dtype=torch.bool)
        second[:, 1:] = ids[:, 1:] == ids[:, :-1]
        return ids, second if self.of == "union" else second | second.roll(-1, -1)

    def _gather(self, log_probs: Tensor, ids: Tensor, omitted: Tensor | None) -> Tensor:
        selected = log_probs.gather(-1, ids)
        if omitted is not None:
            selected = selected.masked_fill(omitted, IMPOSSIBLE)
        if self.remainder in ("drop", "stop"):
            return selected
        if self.remainder == "renormalize":
            return selected.log_softmax(-1)
        # Summing what is left is exact where 1 − Σ would be rounding noise; a support that holds all leaves IMPOSSIBLE.
        if omitted is None or self.of == "union":
            rest = log_probs.scatter(-1, ids, IMPOSSIBLE)
        else:  # what is omitted belongs to the rest, where a union's duplicates do not
            kept = torch.zeros_like(log_probs, dtype=torch.bool).scatter_(-1, ids, ~omitted)
            rest = log_probs.masked_fill(kept, IMPOSSIBLE)
        return torch.cat([selected, rest.logsumexp(-1, keepdim=True).clamp(min=IMPOSSIBLE)], -1)
