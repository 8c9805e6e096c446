"""WeightAverage: evaluation and export take an average of the student's weights over training."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from ..callback import DistillationCallback
from ..module import OnPolicyDistillation
from ..optimizer_step import OptimizerStep
from ..sharding import refuse_sharded


class WeightAverage(DistillationCallback):
    """Average ← (1−rate)·average + rate·student after every optimizer step; the student itself is trained on.

    Validation during training measures the average, and so do `opd validate`, `test`, `predict` and `export` of a
    checkpoint. (A teacher that is such an average is another thing: `EMA`.) It is kept in float32, beside the weights
    and in the checkpoint; validation holds the student's own for as long as it takes. Adapters are averaged factor by
    factor, as AnyFlow does it.

    Example::

        callbacks+:
          - {class_path: WeightAverage, init_args: {rate: 0.01}}

    Args:
        rate: the student's share per optimizer step, in (0, 1]. Default 0.001 (AnyFlow, 2605.13724: EMA .999 in its
            first stage; .99 in its second, which is 0.01 here).

    Raises:
        ValueError: rate outside (0, 1]; when training begins: a strategy that shards the student.
    """

    def __init__(self, rate: float = 0.001) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"WeightAverage.rate is the student's share per optimizer step, in (0, 1]; got {rate}")
        self.rate = rate
        self.average: dict[str, Tensor] = {}
        self._student: dict[str, Tensor] = {}

    def check(self, module: OnPolicyDistillation) -> None:
        refuse_sharded(module.trainer, "WeightAverage", "whose weights it could not put back")

    def on_optimizer_step_start(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        if not self.average:
            self.average = {name: weight.detach().float().clone() for name, weight in _trained(module).items()}
        # a checkpoint is restored before the model is on its device
        self.average = {name: average.to(module.device) for name, average in self.average.items()}

    @torch.no_grad()
    def on_optimizer_step_end(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        for name, weight in _trained(module).items():
            self.average[name].lerp_(weight.float(), self.rate)

    @torch.no_grad()
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, weight in _trained(pl_module).items():
            # none before the first optimizer step
            if name in self.average:
                self._student[name] = weight.detach().clone()
                weight.copy_(self.average[name])

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, weight in _trained(pl_module).items():
            if name in self._student:
                weight.copy_(self._student.pop(name))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["averaged"] = {f"student.{name}": weight.cpu() for name, weight in self.average.items()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.average = {
            name.removeprefix("student."): weight for name, weight in checkpoint.get("averaged", {}).items()
        }


def _trained(module: Any) -> dict[str, Tensor]:
    return {name: weight for name, weight in module.student.named_parameters() if weight.requires_grad}
