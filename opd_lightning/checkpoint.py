"""What is in a checkpoint, and when one is written."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.fabric.utilities.seed import _collect_rng_states
from lightning.pytorch.callbacks import ModelCheckpoint

if TYPE_CHECKING:
    from .module import OnPolicyDistillation


def kept_names(module: OnPolicyDistillation) -> set[str]:
    """Names of the state that a checkpoint holds: trained weights, adapters and EMA teachers; no frozen base."""
    student, everything = module.student, set(module.state_dict())
    if module._student_spec.lora is None:
        return everything
    # a tied head is the same parameter under a second name, and just as frozen
    parameters = student.named_parameters(remove_duplicate=False)
    frozen = {name for name, p in parameters if not p.requires_grad and "lora_" not in name}
    frozen |= {name for name, _ in student.named_buffers()}
    # the scales and maps that bitsandbytes keeps beside each weight
    frozen |= {name for name in student.state_dict() if any(name.startswith(f"{base}.") for base in frozen)}
    return everything - {f"student.{name}" for name in frozen}


def plain_rng_states() -> dict[str, Any]:
    """RNG states as tensors, numbers, lists and tuples only, so that ``weights_only=True`` loads them."""
    states = _collect_rng_states()
    name, keys, *rest = states["numpy"]
    return {**states, "numpy": (name, keys.tolist(), *rest)}


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, under ``<default_root_dir>/checkpoints`` and with ``last.ckpt`` to resume from.

    Args:
        every_n_train_steps: optimiser steps between checkpoints.
        dirpath, monitor, mode, save_top_k, save_last: as in Lightning.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = 100,
        dirpath: str | None = None,
        monitor: str | None = None,
        mode: str = "max",
        save_top_k: int = 1,
        save_last: bool = True,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step-{step}",
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            every_n_train_steps=every_n_train_steps,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._settle(trainer)
        super().setup(trainer, pl_module, stage)

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        # `--ckpt_path=last` is looked up before setup
        self._settle(trainer)
        return super()._find_last_checkpoints(trainer)

    def _settle(self, trainer: L.Trainer) -> None:
        self.dirpath = self.dirpath or os.path.join(trainer.default_root_dir, "checkpoints")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.global_step and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
