"""Aligned: what a teacher of another tokenizer says of a text, at the student's states.

Shape legend: B trajectories, T steps, N trained steps, n of a piece, M ids that both vocabularies have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .categorical import Categorical
from .chunk import CategoricalChunk
from .scored import Scored, ScoredChunk


@dataclass
class Aligned(Scored):
    """Log-probs of the actions, as a teacher's of the same bytes are shared out, and its own distributions.

    Attributes:
        own: over the teacher's vocabulary, at the states ``[B, T]`` (or ``[N]``) where it is paired with the student.
        paired: ``[B, T]`` or ``[N]`` bool, these states.
        rest: ``[B, T, 2]`` or ``[N, 2]``, at a paired state the log-prob of the later tokens of its chunk: of the
            student as it acted (NaN where nobody knows it), and of the teacher.
        matched: ``[2, M]``, ids of the student and of the teacher that write the same.
    """

    own: Categorical = None  # type: ignore[assignment]
    paired: Tensor = None  # type: ignore[assignment]
    rest: Tensor = None  # type: ignore[assignment]
    matched: Tensor = None  # type: ignore[assignment]

    def at(self, index: Tensor) -> Aligned:
        flat = {name: getattr(self, name).flatten()[index] for name in ("log_probs", "actions", "paired")}
        return replace(self, own=self.own.at(index), rest=self.rest.flatten(0, -2)[index], **flat)

    def to(self, device: torch.device | str) -> Aligned:
        names = ("log_probs", "actions", "paired", "rest", "matched")
        return replace(self, own=self.own.to(device), **{name: getattr(self, name).to(device) for name in names})

    def bytes_per_state(self) -> int:
        return super().bytes_per_state() + self.own.bytes_per_state()

    def prepare(self, states: slice) -> None:
        self.own.prepare(states)

    def chunk(self, states: slice) -> AlignedChunk:
        return AlignedChunk(
            self.log_probs[states],
            self.actions[states],
            self.vocabulary,
            self.own.chunk(states),
            self.paired[states],
            self.rest[states],
            self.matched,
        )


class AlignedChunk(ScoredChunk):
    """Distributions and log-probs of a teacher of another tokenizer, at the n states of one piece.

    Attributes:
        own: its distributions over its own vocabulary; of no meaning where ``paired`` is False.
        paired: ``[n]`` bool.
        rest: ``[n, 2]``, as in `Aligned`.
        matched: ``[2, M]``, as in `Aligned`.
    """

    def __init__(
        self,
        log_probs: Tensor,
        actions: Tensor,
        vocabulary: int,
        own: CategoricalChunk,
        paired: Tensor,
        rest: Tensor,
        matched: Tensor,
    ) -> None:
        super().__init__(log_probs, actions, vocabulary)
        self.own, self.paired, self.rest, self.matched = own, paired, rest, matched
