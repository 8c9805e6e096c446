"""Generation: a whole generation batch, for the parts of a term that are settled before it is trained.

Shape legend: B trajectories of this rank, T steps, M values of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..trajectory import Trajectories
from .steps import Steps


@dataclass(frozen=True)
class Generation:
    """Input of a part of scope ``generation``, once, when a generation batch is rolled out and its groups are complete.

    The result, ``[B, T]``, is kept with the trajectories (and in checkpoints): it does not depend on how the batch
    is cut into micro-batches, optimizer steps and ranks, nor on how often it is trained.

    Attributes:
        trajectories: the batch, on the CPU; rewards that abstain read as 0.
        on: ``[B, T]`` bool: the trained steps where the term applies.
        statistics: ``[B, T]`` by ``<stream>/<what>`` (`Part.reads`), NaN where a stream is not defined.
        everywhere: concatenates values ``[M]`` over all ranks, each of which must call it.
    """

    trajectories: Trajectories
    on: Tensor
    statistics: dict[str, Tensor]
    everywhere: Callable[[Tensor], Tensor]

    @property
    def steps(self) -> Steps:
        """All N trained steps, with their statistics: as parts of the scopes ``data`` and ``row`` are given them."""
        steps = Steps.of(self.trajectories).for_stream("teacher")
        return replace(steps, statistics={name: rows.flatten()[steps.index] for name, rows in self.statistics.items()})

    def rows(self, values: Tensor) -> Tensor:
        """Spreads values ``[N]`` of the trained steps over ``[B, T]``, NaN elsewhere."""
        rows = values.new_full(self.on.shape, torch.nan)
        rows[self.trajectories.mask] = values
        return rows
