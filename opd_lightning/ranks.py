"""Ranks: collectives over the processes of a run. No other file calls one on values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor

from .heart import HEART

T = TypeVar("T")
# In a thread that speaks for a rank whose main thread hangs: collects a value of every rank, past all collectives
_EXCHANGE: ContextVar[Callable[[Any], list[Any]] | None] = ContextVar("exchange", default=None)


@contextmanager
def speaking(exchange: Callable[[Any], list[Any]]) -> Iterator[None]:
    """Lets this thread's collectives go through ``exchange``, which collects a value of every rank."""
    token = _EXCHANGE.set(exchange)
    try:
        yield
    finally:
        _EXCHANGE.reset(token)


def is_speaking() -> bool:
    """Tells whether this thread is `speaking` for a rank whose main thread hangs."""
    return _EXCHANGE.get() is not None


def exchanged(value: Tensor) -> list[Tensor] | None:
    """Collects a tensor of every rank in a thread that is `speaking`; None: this one is not."""
    exchange = _EXCHANGE.get()
    return None if exchange is None else exchange(value.detach().cpu())


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
        if (everyone := exchanged(tensor)) is not None:
            total = torch.stack(everyone).sum(0)
            return total if how == "sum" else total / self.count
        with HEART.waiting():
            reduced: Tensor = self.trainer.strategy.reduce(tensor.to(self.trainer.strategy.root_device), reduce_op=how)
        return reduced

    def gather(self, values: Tensor) -> Tensor:
        """Concatenates ``[N]`` of every rank; ranks may differ in N."""
        if self.trainer is None or self.count == 1:
            return values
        if (everyone := exchanged(values)) is not None:
            return torch.cat(everyone)
        strategy = self.trainer.strategy
        with HEART.waiting():
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
        if (exchange := _EXCHANGE.get()) is not None:
            return exchange(value)
        # past Lightning, which gathers tensors only
        everyone: list[Any] = [None] * self.count
        with HEART.waiting():
            torch.distributed.all_gather_object(everyone, value)
        return everyone
