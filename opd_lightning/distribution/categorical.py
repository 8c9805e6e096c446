"""Categorical: hidden states and a head.

Shape legend: N states, n states of one chunk, H hidden size, V vocabulary.

The logits of all states never exist. Those of one chunk are projected at once, since matrix products want many states;
what follows is computed piece by piece, since a piece fits the processor's cache. The gradient with respect to a
piece's logits takes their place, and when a chunk is done its gradients of the hidden states and of the head are added
up, so no tensor of size N × V is ever kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import Distribution, GradientAccumulator
from .chunk import CategoricalChunk
from .head import IMPOSSIBLE, Head, compute_dtype, wide

# Pieces of a chunk, and the bytes of float32 logits below which cutting finer costs more than the cache gives
PIECES, SMALL_PIECE = 8, 2**20
# Ids whose rows of the head are cast, and whose gradients are widened, together
BLOCK = 8192


@dataclass
class Categorical(Distribution):
    """Hidden states ``[B, T, H]`` or ``[N, H]``, and the head that turns them into logits.

    Attributes:
        layers: hidden states of the same shape by number of the layer, for parts that read them (`Part.layers`).
    """

    hidden: Tensor
    head: Head
    layers: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._prepared, self._is_projected = slice(0, 0), False
        self._raw: Tensor | None = None

    @property
    def states(self) -> tuple[int, ...]:
        return tuple(self.hidden.shape[:-1])

    def at(self, index: Tensor) -> Categorical:
        return self._map(lambda hidden: hidden.reshape(-1, hidden.shape[-1])[index])

    def to(self, device: torch.device | str) -> Categorical:
        return self._map(lambda hidden: hidden.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Categorical:
        layers = {number: change(hidden) for number, hidden in self.layers.items()}
        return replace(self, hidden=change(self.hidden), layers=layers)

    def bytes_per_state(self) -> int:
        # raw logits; of a piece, four tensors: log-probabilities, probabilities, contributions and their gradient
        dtype = compute_dtype(self.hidden) or self.hidden.dtype
        # and of each layer its float32 values with their gradient
        return self.head.vocabulary * (dtype.itemsize + 4 * 4 // PIECES) + 8 * self.hidden.shape[-1] * len(self.layers)

    def bytes_kept(self) -> int:
        # prepared, a teacher's logits stay while all pieces of the chunk are opened
        return self.bytes_per_state()

    def piece(self, count: int) -> int:
        return max(math.ceil(count / PIECES), SMALL_PIECE // (4 * self.head.vocabulary))

    def accumulator(self) -> GradientAccumulator:
        return _CategoricalGradient(self)

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yields blocks of ids, each with its weight and bias of a plain head in the compute dtype.

        One block where that is float32: blocks bound the memory of casts, and of products before a float32 sum.
        """
        weight, bias = (None if tensor is None else tensor.detach() for tensor in self.head.linear(None))
        assert weight is not None
        size = BLOCK if self._dtype.itemsize < 4 else len(weight)
        for start in range(0, len(weight), size):
            ids = slice(start, min(start + size, len(weight)))
            yield ids, weight[ids].to(self._dtype), None if bias is None else bias[ids].to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """Compute dtype of a plain head."""
        return compute_dtype(self.hidden) or self.head.linear(None)[0].dtype

    def prepare(self, states: slice) -> None:
        self._prepared, self._is_projected = states, False

    @torch.no_grad()
    def _project(self) -> None:
        """Computes the raw logits of the prepared states."""
        self._is_projected = True
        if not self.head.is_linear:
            self._raw = self.head.project(self.hidden[self._prepared])
            return
        hidden = self.hidden[self._prepared].detach().to(self._dtype)
        if self._raw is None or len(self._raw) < len(hidden):
            # one buffer for all chunks: blocks of this size go back to the system and cost page faults anew
            self._raw = hidden.new_empty(len(hidden), self.head.vocabulary)
        raw = self._raw[: len(hidden)]
        for ids, weight, bias in self.blocks():
            if bias is None:
                torch.mm(hidden, weight.T, out=raw[:, ids])
            else:
                torch.addmm(bias, hidden, weight.T, out=raw[:, ids])
        if self.head.is_plain:
            # no −inf, of which 0 × ∞ would make NaN; float16 has less room
            impossible = max(IMPOSSIBLE, torch.finfo(raw.dtype).min)
            raw.clamp_(min=impossible)
            if self.head.suppressed is not None:
                raw.index_fill_(-1, self.head.suppressed.to(raw.device), impossible)

    def raw(self, states: slice) -> Tensor:
        """Returns the raw logits ``[n, V]``, projected with all that is prepared; they may be overwritten."""
        if not self._prepared.start <= states.start < states.stop <= self._prepared.stop:
            self.prepare(states)
        if not self._is_projected:
            self._project()
        assert self._raw is not None
        first = self._prepared.start
        return self._raw[states.start - first : states.stop - first]

    def chunk(self, states: slice) -> CategoricalChunk:
        layers = {number: wide(hidden[states].detach()) for number, hidden in self.layers.items()}
        return CategoricalChunk(partial(self._logits, states), self.head.is_plain, layers)

    @torch.no_grad()
    def _logits(self, states: slice) -> Tensor:
        raw = self.raw(states)
        return wide(raw) if self.head.is_plain else self.head.finish(raw).clamp(min=IMPOSSIBLE)


class _CategoricalGradient(GradientAccumulator):
    """Gradients of the hidden states and of the head's trained parameters, added up chunk by chunk.

    None for what nothing depended on: where only hidden states of layers are read, the head is not computed.
    """

    def __init__(self, student: Categorical) -> None:
        self._student, self._head, self._hidden = student, student.head, student.hidden
        self._parameters = student.head.trainable()
        self.inputs = [student.hidden, *student.layers.values(), *self._parameters]
        self._sums: dict[int, Tensor] = {}
        self._prepared = slice(0, 0)
        self._projected: Tensor | None = None
        self._leaf: Tensor | None = None

    @property
    def gradients(self) -> Sequence[Tensor | None]:
        return [self._sums.get(place) for place in range(len(self.inputs))]

    def _sum(self, place: int) -> Tensor:
        """Returns the sum of the gradients of an input, which begins at 0."""
        if place not in self._sums:
            tensor = self.inputs[place]
            # at 16 bits a long sum loses what single chunks add
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            self._sums[place] = torch.zeros_like(tensor, dtype=dtype)
        return self._sums[place]

    def prepare(self, states: slice) -> None:
        self._prepared, self._projected = states, None
        self._unread: list[slice] = []
        self._is_read = False
        self._student.prepare(states)

    def open(self, states: slice) -> CategoricalChunk:
        if not self._prepared.start <= states.start < states.stop <= self._prepared.stop:
            self.prepare(states)
        self._states = states
        layers = self._student.layers.items()
        self._layers = {number: wide(hidden[states]).detach().requires_grad_() for number, hidden in layers}
        return CategoricalChunk(self._logits, self._head.is_plain, self._layers)

    @torch.enable_grad()
    def _logits(self) -> Tensor:
        """Computes the logits of the open piece, with a leaf of its graph, when they are first read."""
        here = self._states
        raw = self._student.raw(here) if self._head.is_linear else self._project()[self._within(here)]
        # log-probabilities, and in the end the gradient, take the place of a plain head's raw logits
        leaf = (wide(raw) if self._head.is_plain else raw).detach().requires_grad_()
        self._leaf = leaf
        return leaf if self._head.is_plain else self._head.finish(leaf).clamp(min=IMPOSSIBLE)

    def _project(self) -> Tensor:
        """Projects the prepared states by a head of another kind, through whose graph gradients go back."""
        if self._projected is None:
            self._open_hidden = self._hidden[self._prepared].detach().requires_grad_()
            self._projected = self._head.project(self._open_hidden)
            self._gradient = torch.empty_like(self._projected)
        return self._projected

    def _within(self, states: slice) -> slice:
        first = self._prepared.start
        return slice(states.start - first, states.stop - first)

    def _gradient_at(self, states: slice) -> Tensor:
        """Returns where the gradient of a piece's raw logits is kept until all of the chunk are there."""
        return self._student.raw(states) if self._head.is_linear else self._gradient[self._within(states)]

    def close(self, loss: Tensor) -> None:
        leaves = [*self._layers.values(), *([] if self._leaf is None else [self._leaf])]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        for place, gradient in enumerate(gradients[: len(self._layers)], 1):
            if gradient is not None:
                self._sum(place)[self._states] = gradient
        if self._leaf is None or gradients[-1] is None:
            self._unread.append(self._states)
        else:
            self._is_read = True
            self._gradient_at(self._states).copy_(gradients[-1])
        self._leaf = None
        del self._layers
        if self._states.stop == self._prepared.stop and self._is_read:
            for states in self._unread:
                self._gradient_at(states).zero_()
            self._add_up()

    def _add_up(self) -> None:
        """Adds the gradients of the inputs, made from the logits' gradients of a whole chunk."""
        places = range(len(self.inputs) - len(self._parameters), len(self.inputs))
        if not self._head.is_linear:
            # through the graph that `_project` left
            leaves = [self._open_hidden, *self._parameters]
            gradients = torch.autograd.grad(self._project(), leaves, self._gradient)
            del self._gradient
            self._projected = None
            self._sum(0)[self._prepared] = gradients[0]
            for place, gradient in zip(places, gradients[1:], strict=True):
                self._sum(place).add_(gradient)
            return
        # `close` left the gradients in the buffer of the raw logits
        logits_gradient = self._student.raw(self._prepared)
        hidden = self._hidden[self._prepared].detach().to(logits_gradient.dtype)
        sums: dict[Any, Tensor] = {p: self._sum(place) for p, place in zip(self._parameters, places, strict=True)}
        of_weight, of_bias = (sums.get(tensor) for tensor in (self._head.module.weight, self._head.module.bias))
        for ids, weight, _ in self._student.blocks():
            gradient = logits_gradient[:, ids]
            self._sum(0)[self._prepared] += gradient @ weight
            if of_bias is not None:
                of_bias[ids] += gradient.sum(0)
            # into the sum itself where dtypes allow: the product is as large as the head
            if of_weight is not None and of_weight.dtype == gradient.dtype:
                of_weight[ids].addmm_(gradient.T, hidden)
            elif of_weight is not None:
                of_weight[ids] += gradient.T @ hidden
