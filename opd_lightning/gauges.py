"""Gauges: what a run has cost so far, beside what it learns."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch

from .diagnostics import Counts
from .heart import HEART
from .metrics import is_logged
from .optimizer_step import MicroBatch
from .peaks import peak_of


class Gauges(L.Callback):
    """Logs seconds per optimizer step, actions that were trained so far, and the shares of backward pass and update.

    Every module brings one. Nothing is measured per action, and validations are not counted as steps.

    Attributes:
        trained: actions trained since the run began, on this rank; after a resume rank 0 has the earlier ones.
    """

    def __init__(self) -> None:
        self.trained = 0
        self._module: Any = None
        self._steps, self._since, self._backward, self._update = 0, 0.0, 0.0, 0.0
        self._apart: Counts = {}, {}, {}, {}, {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._module = pl_module

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stopwatch = self._module.metrics.stopwatch
        stopwatch.peak = peak_of(pl_module.device, str(trainer.precision))
        self._begin()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:  # after the evaluation before training, which is no part of a step
            self._begin()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        self._backward, HEART.phase = time.perf_counter(), "backward"

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._spend("backward", self._backward)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._update, HEART.phase = time.perf_counter(), "update"

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        """Counts; comes before the module's own hook, which logs it."""
        if not batch.is_last:
            return
        # not earlier: a checkpoint from the middle of a step goes back to its beginning
        self.trained += sum(int(trajectories.mask.sum()) for trajectories in batch.step.trajectories)
        self._spend("update", self._update)
        self._steps += 1
        if is_logged(trainer, trainer.global_step):
            total = self._module.total(float(self.trained))
            now = time.perf_counter()
            seconds = (now - self._since) / self._steps
            self._module.metrics.gauges = {f"train/{self._module.unit}_so_far": total, "time/step_s": seconds}
            self._steps, self._since = 0, now

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._update, self._apart = time.perf_counter(), self._module.metrics.stopwatch.set_aside()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes validation out of the time of steps and of their phases: teachers are asked there, too."""
        stopwatch, spent = self._module.metrics.stopwatch, time.perf_counter() - self._update
        stopwatch.restore(self._apart)
        stopwatch.since += spent
        self._since += spent

    def state_dict(self) -> dict[str, Any]:
        """Saves the actions of all ranks; every rank asks."""
        return {"trained": int(self._module.total(float(self.trained)))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.trained = state_dict["trained"] if self._module.global_rank == 0 else 0

    def _begin(self) -> None:
        """Begins to measure; what was before belongs to no step."""
        self._steps, self._since = 0, time.perf_counter()
        self._module.metrics.stopwatch.read()

    def _spend(self, name: str, since: float) -> None:
        """Adds to the time of a phase."""
        seconds = self._module.metrics.stopwatch.seconds
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - since
