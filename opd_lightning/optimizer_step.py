"""An optimizer step: its micro-batches on this rank, and the totals that their losses are divided by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .distribution import Stream
from .trajectory import Trajectories


@dataclass
class Totals:
    """Sums over all micro-batches of an optimizer step **and all ranks**.

    Attributes:
        trained_steps: Σ mask: the default normalizer Z.
        rewarded_steps: the same without rows whose reward abstains: Z of the terms that read rewards.
        weight_sums: by term name, Z of the terms that divide by their sum of weights.
        statistics: per micro-batch, the per-step statistics ``[N]`` that parts with a wider scope read.
        gather: concatenates a tensor ``[N]`` over all ranks.
    """

    trained_steps: float
    rewarded_steps: float
    weight_sums: dict[str, float] | None = None
    statistics: list[dict[str, Tensor]] | None = None
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @classmethod
    def of(cls, micro_batches: Sequence[Trajectories], total: Callable[[float], float]) -> Totals:
        """Counts the trained steps; ``total`` sums over ranks."""
        trained = total(float(sum(int(batch.mask.sum()) for batch in micro_batches)))
        if micro_batches[0].reward is None:
            return cls(trained, trained)
        return cls(trained, total(float(sum(int(batch.rewarded_steps) for batch in micro_batches))))

    def over_batch(self, key: str) -> Tensor:
        """``[M]`` one statistic at every trained step of the optimizer step, on all ranks."""
        assert self.statistics is not None
        return self.gather(torch.cat([values[key] for values in self.statistics]))


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
        totals: what their losses are divided by.
        caches: per micro-batch, by teacher, the streams that will be read again: in this optimizer step, or in another
            epoch over the same generation batch.
    """

    trajectories: list[Trajectories]
    totals: Totals
    caches: list[Cache] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.caches = self.caches or [{} for _ in self.trajectories]

    @classmethod
    def of(
        cls,
        trajectories: Sequence[Trajectories],
        total: Callable[[float], float],
        caches: Sequence[Cache] = (),
    ) -> OptimizerStep:
        """Makes one of batches of trajectories; ``total`` sums over ranks."""
        return cls(list(trajectories), Totals.of(trajectories, total), list(caches))

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
