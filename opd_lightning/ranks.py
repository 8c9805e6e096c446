"""Ranks: collectives over the processes of a run. No other file calls one on values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a trainer. Every method is collective: all ranks must call it, or those that do wait for ever.

    Attributes:
        trainer: whose ranks they are; None: there is one.
    """

    trainer: L.Trainer | None

    @property
    def count(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def total(self, value: float) -> float:
        """Sums a number over the ranks."""
        return float(self.sum(torch.tensor(value))) if self.count > 1 else value

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks."""
        return self._reduce(tensor, "sum")

    def mean(self, tensor: Tensor) -> Tensor:
        """Averages a tensor over the ranks."""
        return self._reduce(tensor, "mean")

    def _reduce(self, tensor: Tensor, how: str) -> Tensor:
        if self.trainer is None or self.count == 1:
            return tensor
        reduced: Tensor = self.trainer.strategy.reduce(tensor.to(self.trainer.strategy.root_device), reduce_op=how)
        return reduced

    def gather(self, values: Tensor) -> Tensor:
        """Concatenates ``[N]`` of every rank; ranks may differ in N."""
        if self.trainer is None or self.count == 1:
            return values
        strategy = self.trainer.strategy
        longest = int(strategy.all_gather(torch.tensor(len(values), device=strategy.root_device)).max())
        # collectives take tensors of one shape
        padded = values.new_full((longest,), float("nan"), device=strategy.root_device)
        padded[: len(values)] = values
        everywhere = strategy.all_gather(padded).flatten()
        # so values must not be NaN themselves
        return everywhere[~everywhere.isnan()]

    def gather_objects(self, value: T) -> list[T]:
        """Collects the value of every rank, in their order; anything that can be pickled."""
        if self.count == 1:
            return [value]
        # past Lightning, which gathers tensors only
        everyone: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(everyone, value)
        return everyone
