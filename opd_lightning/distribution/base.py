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
        """Restricts it to the N states at ``index [N]`` of the flattened B × T."""

    @abstractmethod
    def bytes_per_state(self) -> int:
        """Estimates the memory that one state takes while its chunk is open."""

    def bytes_kept(self) -> int:
        """Estimates the bytes per state that a teacher adds to an open chunk of the student."""
        return 0

    @abstractmethod
    def accumulator(self) -> GradientAccumulator:
        """Collects the gradient of a loss that is evaluated chunk by chunk."""

    @abstractmethod
    def chunk(self, states: slice) -> Any:
        """Opens some of the N states without gradient, as a chunk; valid until the next is opened or prepared."""

    def prepare(self, states: slice) -> None:  # noqa: B027  (only a vocabulary has something to prepare)
        """Computes what is shared by the pieces of a chunk, before any is opened (a vocabulary's logits)."""

    def piece(self, count: int) -> int:
        """Returns how many states of a chunk of ``count`` are opened together."""
        return count

    def to(self, device: torch.device | str) -> Distribution | None:
        """Moves its tensors to another device; None where it holds none and is evaluated when it is opened."""
        return None

    def only_at(self, states: Tensor) -> Distribution:
        """Restricts evaluation to ``states [N]`` (bool); values at the others are undefined."""
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
        """Prepares a chunk, as `Distribution.prepare`; each piece is then opened and closed once, in order."""

    @abstractmethod
    def open(self, states: slice) -> Any:
        """Opens some of the N states as leaves of a graph of their own, so that `close` can differentiate."""

    @abstractmethod
    def close(self, loss: Tensor) -> None:
        """Adds the gradient of ``loss`` (a scalar that depends on the open chunk) and drops the chunk."""
