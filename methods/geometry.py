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


class ProjectGradient(DistillationCallback):
    """Confines gradients to the directions in which each matrix has moved by a certain step (2606.07082).

    g ← g·V·Vᵀ, V the right singular vectors of ΔW with the largest singular values. A matrix that has not moved is left
    free. The paper keeps on-policy distillation's accuracy so, and SFT loses some.

    Args:
        start: optimizer steps after which V is taken. The paper's are about a fifth of the run.
        rank: directions that are left to a matrix. Default 16 (2606.07082).

    Raises:
        ValueError: a number below 1; when training begins, a student that is sharded.
    """

    remembers = ("first", "directions")

    def __init__(self, start: int, rank: int = 16) -> None:
        if min(start, rank) < 1:
            raise ValueError(f"ProjectGradient: start={start} and rank={rank} must be >= 1")
        self.start, self.rank = start, rank
        self.first: Weights = {}
        self.directions: Weights = {}

    def check(self, module: OnPolicyDistillation) -> None:
        refuse_sharded(module.trainer, "ProjectGradient", "whose matrices it could not see")

    def on_optimizer_step_start(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        if module.global_step == 0:
            self.first = {name: weight.detach().cpu().clone() for name, weight in matrices(module).items()}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for name, weight in matrices(pl_module).items():
            if weight.grad is not None and name in self.directions:
                weight.grad = projected(weight.grad, self.directions[name].to(weight.grad))

    @torch.no_grad()
    def on_optimizer_step_end(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        if module.global_step != self.start:
            return
        for name, weight in matrices(module).items():
            moved = weight.detach().cpu().float() - self.first[name].float()
            if bool(moved.any()):
                self.directions[name] = torch.linalg.svd(moved, full_matrices=False).Vh[: self.rank].T.contiguous()
        self.first = {}


def projected(gradient: Tensor, directions: Tensor) -> Tensor:
    """Returns g·V·Vᵀ ``[m, n]`` for orthonormal directions V ``[n, r]``."""
    return gradient @ directions @ directions.T
