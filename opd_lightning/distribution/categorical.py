"""Categorical: hidden states and a head.

Shape legend: N states, n states of one chunk, H hidden size, V vocabulary.

The logits of all states never exist. Those of one chunk are projected at once, since matrix products want many states;
what follows is computed piece by piece, since a piece fits the processor's cache. The gradient with respect to a
piece's logits takes their place, and when a chunk is done its gradients of the hidden states and of the head are added
up, so no tensor of size N × V is ever kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    """Hidden states ``[B, T, H]`` or ``[N, H]``, and the head that turns them into logits."""

    hidden: Tensor
    head: Head

    def __post_init__(self) -> None:
        self._prepared = slice(0, 0)
        self._raw: Tensor | None = None

    @property
    def states(self) -> tuple[int, ...]:
        return tuple(self.hidden.shape[:-1])

    def at(self, index: Tensor) -> Categorical:
        return replace(self, hidden=self.hidden.reshape(-1, self.hidden.shape[-1])[index])

    def to(self, device: torch.device | str) -> Categorical:
        return replace(self, hidden=self.hidden.to(device))

    def bytes_per_state(self) -> int:
        # raw logits; of a piece, four tensors: log-probabilities, probabilities, contributions and their gradient
        dtype = compute_dtype(self.hidden) or self.hidden.dtype
        return self.head.vocabulary * (dtype.itemsize + 4 * 4 // PIECES)

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

    @torch.no_grad()
    def prepare(self, states: slice) -> None:
        if not self.head.is_linear:
            self._raw = self.head.project(self.hidden[states])
        else:
            hidden = self.hidden[states].detach().to(self._dtype)
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
                # no −inf, of which 0 × ∞ would make NaN
                raw.clamp_(min=IMPOSSIBLE)
                if self.head.suppressed is not None:
                    raw.index_fill_(-1, self.head.suppressed.to(raw.device), IMPOSSIBLE)
        self._prepared = states

    def raw(self, states: slice) -> Tensor:
        """Returns the raw logits ``[n, V]``, projected if they are not prepared; they may be overwritten."""
        if not self._prepared.start <= states.start < states.stop <= self._prepared.stop:
            self.prepare(states)
        assert self._raw is not None
        first = self._prepared.start
        return self._raw[states.start - first : states.stop - first]

    def chunk(self, states: slice) -> CategoricalChunk:
        with torch.no_grad():
            raw = self.raw(states)
            if self.head.is_plain:
                return CategoricalChunk(wide(raw), owned=True)
            return CategoricalChunk(self.head.finish(raw).clamp(min=IMPOSSIBLE))


class _CategoricalGradient(GradientAccumulator):
    """Gradients of the hidden states and of the head's trained parameters, added up chunk by chunk."""

    def __init__(self, student: Categorical) -> None:
        self._student, self._head, self._hidden = student, student.head, student.hidden
        self._parameters = student.head.trainable()
        self.inputs = [student.hidden, *self._parameters]
        # at 16 bits a long sum loses what single chunks add
        dtype = torch.promote_types(student.hidden.dtype, torch.float32)
        self.sums = [torch.zeros_like(tensor, dtype=dtype) for tensor in self.inputs]
        self._prepared = slice(0, 0)

    def prepare(self, states: slice) -> None:
        self._prepared = states
        if self._head.is_linear:
            self._student.prepare(states)
            return
        self._open_hidden = self._hidden[states].detach().requires_grad_()
        with torch.enable_grad():
            self._projected = self._head.project(self._open_hidden)
        self._gradient = torch.empty_like(self._projected)

    def open(self, states: slice) -> CategoricalChunk:
        if not self._prepared.start <= states.start < states.stop <= self._prepared.stop:
            self.prepare(states)
        self._states = states
        if self._head.is_plain:
            # log-probabilities, and in the end the gradient, take the place of the raw logits
            self._gradient_here = self._student.raw(states)
            self._leaf = wide(self._gradient_here).detach().requires_grad_()
            return CategoricalChunk(self._leaf, owned=True)
        if self._head.is_linear:
            raw = self._gradient_here = self._student.raw(states)
        else:
            first = self._prepared.start
            here = slice(states.start - first, states.stop - first)
            raw, self._gradient_here = self._projected[here], self._gradient[here]
        self._leaf = raw.detach().requires_grad_()
        return CategoricalChunk(self._head.finish(self._leaf).clamp(min=IMPOSSIBLE))

    def close(self, loss: Tensor) -> None:
        (gradient,) = torch.autograd.grad(loss, [self._leaf])
        del self._leaf
        self._gradient_here.copy_(gradient)
        if self._states.stop == self._prepared.stop:
            self._add_up()

    def _add_up(self) -> None:
        """Adds the gradients of the inputs, made from the logits' gradients of a whole chunk."""
        if not self._head.is_linear:
            # through the graph that `prepare` left
            leaves = [self._open_hidden, *self._parameters]
            gradients = torch.autograd.grad(self._projected, leaves, self._gradient)
            del self._projected, self._gradient, self._gradient_here
            self.sums[0][self._prepared] = gradients[0]
            for total, gradient in zip(self.sums[1:], gradients[1:], strict=True):
                total.add_(gradient)
            return
        # `close` left the gradients in the buffer of the raw logits
        logits_gradient = self._student.raw(self._prepared)
        hidden = self._hidden[self._prepared].detach().to(logits_gradient.dtype)
        sums: dict[Any, Tensor] = dict(zip(self._parameters, self.sums[1:], strict=True))
        of_weight, of_bias = (sums.get(tensor) for tensor in (self._head.module.weight, self._head.module.bias))
        for ids, weight, _ in self._student.blocks():
            gradient = logits_gradient[:, ids]
            self.sums[0][self._prepared] += gradient @ weight
            if of_bias is not None:
                of_bias[ids] += gradient.sum(0)
            # into the sum itself where dtypes allow: the product is as large as the head
            if of_weight is not None and of_weight.dtype == gradient.dtype:
                of_weight[ids].addmm_(gradient.T, hidden)
            elif of_weight is not None:
                of_weight[ids] += gradient.T @ hidden
