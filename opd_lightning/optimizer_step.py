"""An optimizer step: its micro-batches on this rank, and what their losses are divided by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .distribution import Stream
from .trajectory import Trajectories


@dataclass(frozen=True)
class CachedStream:
    """A stream on the CPU, to be read again.

    Attributes:
        stream: what the teacher said of a micro-batch.
        step: optimizer steps that were done then.
        views: the example that the teacher was shown, per trajectory; None: the stream holds for that step only.
    """

    stream: Stream
    step: int
    views: list[dict[str, Any] | None] | None


Cache = dict[str, CachedStream]


@dataclass
class OptimizerStep:
    """The micro-batches that are trained together on this rank.

    Attributes:
        trajectories: one batch of them per micro-batch, in the order in which they are trained.
        normalizers: Z by term name, over all micro-batches and ranks; None until the first one is to be trained.
        caches: per micro-batch, by teacher, the streams that will be read again: in this optimizer step, or in another
            epoch over the same generation batch.
    """

    trajectories: list[Trajectories]
    normalizers: dict[str, float] | None = None
    caches: list[Cache] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.caches = self.caches or [{} for _ in self.trajectories]

    def __len__(self) -> int:
        """Micro-batches."""
        return len(self.trajectories)

    def __iter__(self) -> Iterator[MicroBatch]:
        return (MicroBatch(self, index) for index in range(len(self)))


class MicroBatch:
    """A place in an optimizer step: what the training dataloader yields.

    No dataclass and without `to`, so that Lightning hands it on as it is: nothing is rounded, nothing moved twice.
    """

    def __init__(self, step: OptimizerStep, index: int) -> None:
        self.step, self.index = step, index

    def __len__(self) -> int:
        """Trajectories."""
        return len(self.trajectories)

    @property
    def trajectories(self) -> Trajectories:
        return self.step.trajectories[self.index]

    @property
    def cache(self) -> Cache:
        """Streams of its teachers that will be read again."""
        return self.step.caches[self.index]

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index + 1 == len(self.step)
