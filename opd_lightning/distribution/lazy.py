"""Lazy: normals that exist only while their chunk is open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from .base import Distribution, GradientAccumulator
from .gaussian import Gaussian


@dataclass
class Lazy(Distribution):
    """Normals that are evaluated when their chunk is opened, for policies that cost a forward pass per state: a
    denoiser at every noise level. Memory then grows with the chunk and not with the number of states.

    Attributes:
        make: from an index ``[n]`` into the flattened B × T states to `Gaussian` of n states.
        parameters: the trained parameters of the policy; none for a teacher.
        size: bytes that one state takes while its chunk is open, activations included.
        index: ``[N]`` into the flattened B × T; None, before `at`: all states.
        asked: ``[N]`` bool, states to evaluate; others hold placeholder values. None: all.
    """

    make: Callable[[Tensor], Gaussian]
    parameters: list[nn.Parameter]
    size: int
    index: Tensor | None = None
    asked: Tensor | None = None

    def only_at(self, states: Tensor) -> Lazy:
        return replace(self, asked=states)

    def at(self, index: Tensor) -> Lazy:
        return replace(self, index=index if self.index is None else self.index[index])

    def bytes_per_state(self) -> int:
        return self.size

    def accumulator(self) -> GradientAccumulator:
        return _LazyGradient(self)

    def chunk(self, states: slice) -> Gaussian:
        with torch.no_grad():
            return self.opened(states)

    def opened(self, states: slice) -> Gaussian:
        """Evaluates some of the N states, with gradient where autograd is on."""
        assert self.index is not None
        if self.asked is None or bool(self.asked[states].all()):
            return self.make(self.index[states])
        return self._partly(self.index[states], self.asked[states])

    def _partly(self, index: Tensor, asked: Tensor) -> Gaussian:
        # one state is evaluated anyway, for the shape of the event
        where = asked if bool(asked.any()) else torch.arange(len(index), device=index.device) < 1
        evaluated = self.make(index[where])

        def spread(values: Tensor) -> Tensor:
            if not values.dim():  # a scale that all states share
                return values
            wide = values.new_ones(len(index), *values.shape[1:])
            wide[where] = values
            return wide

        return replace(evaluated, **{item.name: spread(getattr(evaluated, item.name)) for item in fields(evaluated)})


class _LazyGradient(GradientAccumulator):
    def __init__(self, student: Lazy) -> None:
        self._student = student
        self.inputs = list(student.parameters)
        self._reached = [False] * len(self.inputs)
        self.sums = [torch.zeros_like(parameter) for parameter in self.inputs]

    @property
    def gradients(self) -> Sequence[Tensor | None]:
        return [total if reached else None for total, reached in zip(self.sums, self._reached, strict=True)]

    def open(self, states: slice) -> Gaussian:
        return self._student.opened(states)

    def close(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, self.inputs, allow_unused=True)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                self.sums[i].add_(gradient)
                self._reached[i] = True
