"""LossSpikes: writes down the rows of optimizer steps whose loss is far above what it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..callback import DistillationCallback
from ..folder import SPIKES
from ..module import OnPolicyDistillation
from ..optimizer_step import MicroBatch, OptimizerStep
from ..policy import evaluating
from ..trajectory import Trajectories


class LossSpikes(DistillationCallback):
    """Watches the loss of each optimizer step over all ranks, and writes the rows of one that spikes.

    A spike is a loss whose magnitude is more than ``factor`` times the median magnitude of the last ``window`` steps;
    spikes are left out of these. The rows that contribute most go to ``spikes.jsonl`` in the run's folder, with what
    was asked and answered and what each contributes to the loss (``share``: read again and alone, with the weights
    after the step). The loss is read after every step, for which a GPU is waited for.

    Example::

        callbacks+:
          - class_path: LossSpikes
            init_args: {factor: 4.0}

    Args:
        factor: default 3, ours.
        window: optimizer steps. Default 50.
        warmup: steps that are not judged at first. Default 10.
        count: rows that are written of a spike. Default 8.

    Raises:
        ValueError: a value out of range.
    """

    remembers = ("losses",)

    def __init__(self, factor: float = 3.0, window: int = 50, warmup: int = 10, count: int = 8) -> None:
        if not factor > 1 or not window >= warmup >= 1 or count < 1:
            raise ValueError(
                f"LossSpikes: factor={factor} must be > 1, count={count} >= 1, and window={window} >= warmup={warmup} "
                ">= 1"
            )
        self.factor, self.window, self.warmup, self.count = factor, window, warmup, count
        self.losses: list[float] = []
        self._loss: Tensor | float = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        if isinstance(outputs, Mapping):
            self._loss = self._loss + outputs["loss"].detach()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_optimizer_step_end(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        # every rank's is its own share, times their number
        loss, self._loss = module.total(float(self._loss)) / module.trainer.world_size, 0.0
        usual = median(map(abs, self.losses)) if len(self.losses) >= self.warmup else None
        if usual is None or abs(loss) <= self.factor * usual:
            self.losses = [*self.losses, loss][-self.window :]
            return
        rows = [row for rows in module.ranks.gather_objects(self._rows(module, step)) for row in rows]
        worst = sorted(rows, key=lambda row: -abs(row["share"]))[: self.count]
        path = module.folder / SPIKES
        rank_zero_warn(
            f"optimizer step {module.global_step}: the loss is {loss:.3g}, against {usual:.3g} in the median of the "
            f"{len(self.losses)} steps before; the rows that contribute most are in {path}"
        )
        if module.trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"loss": loss, "median": usual, **row}) + "\n" for row in worst)

    def _rows(self, module: OnPolicyDistillation, step: OptimizerStep) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for batch in step.trajectories:
            acted = batch.to("cpu")
            read = module.actor.checked_rewards(acted)[1]
            for i in range(len(acted)):
                row = acted.select(torch.tensor([i]))
                reward = None if acted.reward is None or acted.reward[i].isnan() else float(acted.reward[i])
                rows.append(
                    {
                        "step": module.global_step,
                        "share": self._share(module, row.to(module.device), step),
                        "prompt": str(read[i].get("prompt", "")),
                        "completion": str(read[i].get("completion", "")),
                        "reward": reward,
                        "length": int(acted.mask[i].sum()),
                        "source": acted.sources[int(acted.source[i])],
                        "version": int(acted.weights_version[i]),
                        "row": int(acted.row[i]),
                        "rank": module.global_rank,
                    }
                )
        return rows

    @torch.no_grad()
    def _share(self, module: OnPolicyDistillation, row: Trajectories, step: OptimizerStep) -> float:
        """Evaluates what one trajectory contributes to the loss of its optimizer step."""
        (batch,) = OptimizerStep([row])
        with module.trainer.precision_plugin.forward_context(), evaluating(module.policies["student"].model):
            streams, student = module.reader.query(batch), module.streams.student(row)
            return float(module.objective(student, streams, row, step.normalizers).loss)
