"""What every family of distributions offers the objective: chunks, and the gradient of a loss on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Distribution(ABC):
    """A policy's distributions over the next step at N states (or at B × T of them, before `at`)."""

    @property
    def states(self) -> tuple[int, ...] | None:
        """B and T, before `at`; None where they are made only when they are opened."""
        return None

    @abstractmethod
    def at(self, index: Tensor) -> Distribution:
        """The N states at ``index [N]`` of the flattened B × T."""

    @abstractmethod
    def bytes_per_state(self) -> int:
        """Memory that one state takes while its chunk is open."""

    def bytes_kept(self) -> int:
        """What of it a chunk of the student keeps in memory, where this is a teacher."""
        return 0

    @abstractmethod
    def accumulator(self) -> GradientAccumulator:
        """Collects the gradient of a loss that is evaluated chunk by chunk."""

    @abstractmethod
    def chunk(self, states: slice) -> Any:
        """The family's chunk at some of the N states, without gradient; valid until others are prepared or opened."""

    def prepare(self, states: slice) -> None:  # noqa: B027  (only a vocabulary has something to prepare)
        """Does what is better done at once for a chunk, before pieces of it are opened."""

    def piece(self, count: int) -> int:
        """How many states of a chunk of ``count`` are opened together."""
        return count

    def to(self, device: torch.device | str) -> Distribution | None:
        """The same, with what it holds on another device; None where it holds nothing and is made when it is opened."""
        return None

    def only_at(self, states: Tensor) -> Distribution:
        """The same, where nobody reads what it says at the others than ``states [N]`` (bool)."""
        return self


class GradientAccumulator(ABC):
    """Opens chunks whose loss can be differentiated, and sums up the gradients of ``inputs`` in ``sums``."""

    inputs: list[Tensor]
    sums: list[Tensor]

    @property
    def gradients(self) -> Sequence[Tensor | None]:
        """None for an input that no chunk depended on, so that it is noticed."""
        return self.sums

    def prepare(self, states: slice) -> None:  # noqa: B027
        """As `Distribution.prepare`; each piece of the chunk is then opened and closed once, in order."""

    @abstractmethod
    def open(self, states: slice) -> Any: ...

    @abstractmethod
    def close(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` (a scalar that depends on the open chunk) and drop the chunk."""
