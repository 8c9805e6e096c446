"""Callbacks that look at the weights themselves: how they move, and in which directions they may."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from ..callback import DistillationCallback
from ..module import OnPolicyDistillation
from ..optimizer_step import OptimizerStep
from ..sharding import refuse_sharded

Weights = dict[str, Tensor]


def matrices(module: L.LightningModule) -> Weights:
    """Selects the student's trained weights that are matrices, by name."""
    student: torch.nn.Module = module.student  # type: ignore[assignment]
    return {name: weight for name, weight in student.named_parameters() if weight.requires_grad and weight.dim() == 2}


class UpdateGeometry(DistillationCallback):
    """Logs how far the student's matrices have moved since the start, and how (2606.07082).

    ``train/geometry/stable_rank``: ‖ΔW‖²_F / ‖ΔW‖²₂, the mean over matrices that moved; ``train/geometry/unchanged``:
    the share of entries that moved by at most ``tolerance`` of what they were.

    Args:
        every: optimizer steps between two looks. Default 10 (ours).
        tolerance: default 1e-3 (2606.07082).
    """

    remembers = ("first",)

    def __init__(self, every: int = 10, tolerance: float = 1e-3) -> None:
        if every < 1 or tolerance < 0:
            raise ValueError(f"UpdateGeometry: every={every} must be >= 1 and tolerance={tolerance} >= 0")
        self.every, self.tolerance = every, tolerance
        self.first: Weights = {}

    def check(self, module: OnPolicyDistillation) -> None:
        refuse_sharded(module.trainer, "UpdateGeometry", "whose matrices it could not see")

    def on_optimizer_step_start(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        if not self.first:
            self.first = {name: weight.detach().cpu().clone() for name, weight in matrices(module).items()}

    @torch.no_grad()
    def on_optimizer_step_end(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        if module.global_step % self.every:
            return
        for name, weight in matrices(module).items():
            first = self.first[name].to(weight)
            moved = weight - first
            unchanged = moved.abs() <= self.tolerance * first.abs()
            module.record("geometry/unchanged", unchanged.double())
            if bool(moved.any()):
                module.record("geometry/stable_rank", stable_rank(moved))


def stable_rank(matrix: Tensor) -> float:
    """Returns ‖W‖²_F / ‖W‖²₂: 1 for one direction, at most the rank."""
    values = torch.linalg.svdvals(matrix.float())
    return float(values.square().sum() / values.amax().square())
