"""Chunks: the trained steps of a micro-batch, opened piece by piece, so that no logits outlive their piece.

Shape legend: N trained steps of a micro-batch, n of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distribution import Distribution, GradientAccumulator, Stream
from .steps import OpenSteps, Steps


@dataclass(frozen=True)
class ChunkSize:
    """How many steps are projected to logits at once: as many as fit into ``mib`` MiB, or ``steps`` of them."""

    mib: int
    steps: int | None = None

    def of(self, bytes_per_state: int) -> int:
        """Returns the number of steps of a chunk, at least 1."""
        return self.steps or max(1, self.mib * 2**20 // bytes_per_state)


@dataclass
class Chunks:
    """Student and teachers at the N trained steps of a micro-batch.

    Attributes:
        student: at the N steps.
        streams: teachers by name, at the N steps.
        steps: the N steps.
        size: of a chunk.
    """

    student: Distribution
    streams: dict[str, Stream]
    steps: Steps
    size: ChunkSize

    @classmethod
    def at(cls, student: Distribution, streams: dict[str, Stream], steps: Steps, size: ChunkSize) -> Chunks:
        """Restricts distributions at all B × T states to the N steps."""
        flat = {name: stream.at(steps.index) for name, stream in streams.items()}
        return cls(student.at(steps.index), flat, steps, size)

    def opened(self, accumulator: GradientAccumulator | None = None) -> Iterator[tuple[slice, OpenSteps]]:
        """Opens each piece of each chunk; with an ``accumulator`` the student has a gradient, and whoever iterates
        closes every piece.

        Yields:
            The slice of the N steps and the open piece; all tensors of a piece must be freed before the next is opened.
        """
        teachers = {name: stream.distribution for name, stream in self.streams.items()}
        blind = {name: s.without_view for name, s in self.streams.items() if s.without_view is not None}
        student = self.student if accumulator is None else accumulator
        policies = (student, *teachers.values(), *blind.values())
        for states in self.cut():
            for policy in policies:
                policy.prepare(states)
            for piece in _evenly(states, self.student.piece(states.stop - states.start)):
                yield piece, self._piece(piece, student, teachers, blind)

    def _piece(
        self,
        states: slice,
        student: Distribution | GradientAccumulator,
        teachers: dict[str, Distribution],
        blind: dict[str, Distribution],
    ) -> OpenSteps:
        # a function of its own, so that nothing but what it returns holds the piece
        if isinstance(student, Distribution):
            opened = student.chunk(states)
        else:
            with torch.enable_grad():
                opened = student.open(states)
        streams = {name: teacher.chunk(states) for name, teacher in teachers.items()}
        without_view = {name: teacher.chunk(states) for name, teacher in blind.items()}
        return self.steps.opened(states, opened, streams, without_view)

    def cut(self) -> Iterator[slice]:
        """Cuts the N steps into chunks."""
        if not len(self.steps):  # then a family may not know what a state takes
            return iter(())
        teachers = (side for stream in self.streams.values() for side in (stream.distribution, stream.without_view))
        teacher_bytes = sum(teacher.bytes_kept() for teacher in teachers if teacher is not None)
        return _evenly(slice(0, len(self.steps)), self.size.of(self.student.bytes_per_state() + teacher_bytes))


class GradientsInside(torch.autograd.Function):
    """Evaluates a loss and its gradients in one go; backward only scales the gradients, which are there already."""

    @staticmethod
    def forward(ctx: Any, evaluate: Callable[[], tuple[Tensor, Sequence[Tensor | None]]], *inputs: Tensor) -> Tensor:
        loss, gradients = evaluate()
        # summed in float32 at least; autograd wants the inputs' dtype
        ctx.gradients = [None if g is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)]
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the objective's gradients were already consumed by an earlier backward pass")
        # in place, since they are handed on once
        return None, *(None if gradient is None else gradient.mul_(outputs[0]) for gradient in gradients)


def _evenly(states: slice, size: int) -> Iterator[slice]:
    """Cuts into slices of at most ``size``, of equal length, so that no small rest costs a pass of its own."""
    count = states.stop - states.start
    if not count:
        return iter(())
    size = math.ceil(count / math.ceil(count / size))
    return (slice(start, min(start + size, states.stop)) for start in range(states.start, states.stop, size))
