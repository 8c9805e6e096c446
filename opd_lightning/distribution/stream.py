"""Stream: a teacher's distributions at the states of a micro-batch, and where it has any."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Distribution


@dataclass(frozen=True)
class Stream:
    """One teacher at the states of a micro-batch.

    Attributes:
        distribution: at all B × T states (or at N of them, after `at`), without gradient.
        available: ``[B]`` bool, the trajectories for which the teacher is defined (its view shows something);
            None: all.
        without_view: the same teacher without its view, for the log; None where it was not queried.
    """

    distribution: Distribution
    available: Tensor | None = None
    without_view: Distribution | None = None

    def at(self, index: Tensor) -> Stream:
        """Restricts it to the N states at ``index [N]`` of the flattened B × T."""
        blind = None if self.without_view is None else self.without_view.at(index)
        return replace(self, distribution=self.distribution.at(index), without_view=blind)

    def to(self, device: torch.device | str) -> Stream | None:
        """Moves what the distribution holds; None where it holds nothing and is evaluated when it is opened."""
        distribution = self.distribution.to(device)
        return None if distribution is None else Stream(distribution, self.available)
