"""Scored: what a teacher without a model here tells of the actions that were taken, and of the likeliest ones.

Shape legend: B trajectories, T steps, N trained steps, n of a piece, k ids told of a state, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from .base import Distribution, GradientAccumulator
from .head import IMPOSSIBLE

ABOVE = 1e-3
"""Nats by which rounding may lift a log-prob, or the sum of those of one state, above 0."""
LEAST_REST = 2.0**-24
"""Probability that what is not told has at least: 1 less a sum of float32 numbers is known no better. At 0 a student
that puts anything there would be infinitely far off, because of rounding alone."""


@dataclass
class Scored(Distribution):
    """Log-probs ``[B, T]`` (or ``[N]``) of the actions taken, and of other ids where they are told.

    What is not told is no probability of zero: the ids of a state that are not told share what is left of 1.

    Attributes:
        log_probs: of the actions, at temperature 1.
        actions: ``[B, T]`` or ``[N]``, the actions themselves.
        vocabulary: V.
        ids: ``[B, T, k]`` or ``[N, k]``, other ids of each state, the likeliest first; -1: none.
        top: their log-probs, of the same shape.
    """

    log_probs: Tensor
    actions: Tensor
    vocabulary: int
    ids: Tensor | None = None
    top: Tensor | None = None

    @property
    def states(self) -> tuple[int, ...]:
        return tuple(self.log_probs.shape)

    def at(self, index: Tensor) -> Scored:
        # once flat it has one dimension less than its ids
        flat = [self.log_probs.flatten()[index], self.actions.flatten()[index]]
        ids, top = (None if t is None else t.flatten(0, -2)[index] for t in (self.ids, self.top))
        return Scored(flat[0], flat[1], self.vocabulary, ids, top)

    def to(self, device: torch.device | str) -> Scored:
        ids, top = (None if t is None else t.to(device) for t in (self.ids, self.top))
        return Scored(self.log_probs.to(device), self.actions.to(device), self.vocabulary, ids, top)

    def bytes_per_state(self) -> int:
        # log-probs over the vocabulary, where a divergence asks for them
        return 4 * self.vocabulary

    def bytes_kept(self) -> int:
        return self.bytes_per_state()

    def accumulator(self) -> GradientAccumulator:
        raise TypeError("what a teacher told has no gradient")

    def chunk(self, states: slice) -> ScoredChunk:
        ids, top = (None if t is None else t[states] for t in (self.ids, self.top))
        return ScoredChunk(self.log_probs[states], self.actions[states], self.vocabulary, ids, top)

    def check(self, told: Tensor, who: str) -> None:
        """Refuses what can't be log-probs of one distribution.

        Args:
            told: ``[B, T]`` bool, the states of which there has to be something.
            who: told it, for the message.

        Raises:
            ValueError: a log-prob is missing (NaN) or above 0, or those of one state add up to more than 1.
        """
        values = [self.log_probs[told]]
        if self.ids is not None and self.top is not None:
            kept = self.ids[told] >= 0
            values += [self.top[told][kept], self.top[told].masked_fill(~kept, IMPOSSIBLE).double().logsumexp(-1)]
        for some in values:
            if bool((wrong := ~(some <= ABOVE)).any()):
                value = float(some[wrong][0])
                what = "NaN" if value != value else f"{value:.4g}"
                raise ValueError(
                    f"{who}: {int(wrong.sum())} of {wrong.numel()} log-probs are above 0, add up to more than 1, or "
                    f"are missing, such as {what}"
                )


class ScoredChunk:
    """Log-probs that are told of the n states of one piece.

    Args:
        log_probs, actions: ``[n]``.
        vocabulary: V.
        ids, top: ``[n, k]``, None where only the action is told.
    """

    def __init__(
        self, log_probs: Tensor, actions: Tensor, vocabulary: int, ids: Tensor | None = None, top: Tensor | None = None
    ) -> None:
        self._log_probs, self._actions, self._vocabulary = log_probs, actions, vocabulary
        self._ids, self._top = ids, top

    def log_prob(self, action: Tensor) -> Tensor:
        """Returns the log-prob ``[n]`` of the action that was taken; of others nothing may be known."""
        return self._log_probs

    def coarse(self) -> Tensor:
        """Returns log-probs ``[n, V]``: what is told, the rest of 1 shared evenly by all other ids.

        Exact where the others are read as one bucket, as a `Support` of the teacher's likeliest ids or of the sampled
        one does.
        """
        # 1. the action beside the others, and −1 (none) in a column that is cut off again
        ids, values = self._actions[:, None], self._log_probs[:, None]
        if self._ids is not None and self._top is not None:
            ids, values = torch.cat([self._ids, ids], -1), torch.cat([self._top, values], -1)
        ids = torch.where(ids < 0, self._vocabulary, ids)
        table = values.new_full((len(ids), self._vocabulary + 1), torch.nan).scatter_(-1, ids, values)[:, :-1]
        # 2. what is left, to each of those that nothing is told of
        told = ~table.isnan()
        total = table.masked_fill(~told, IMPOSSIBLE).double().logsumexp(-1, keepdim=True)
        left = (-total.expm1()).clamp(min=LEAST_REST).log()
        share = left - (~told).sum(-1, keepdim=True).clamp(min=1).double().log()
        return torch.where(told, table, share.to(table.dtype))

    def entropy(self) -> NoReturn:
        self._refuse("entropy")

    def confidence(self) -> NoReturn:
        self._refuse("confidence")

    def known(self, temperature: float = 1.0) -> NoReturn:
        self._refuse("probabilities over the vocabulary")

    log_probs = known

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(
            f"this teacher tells log-probs of the actions and of the likeliest ones alone, so nobody knows its {what}; "
            "a part that reads them names `distribution` in its needs, so that it is refused before training"
        )
