"""Short runs of the text quickstart inside this process: its student, its teacher, its sums with a scratchpad.

A run is that of configs/text/quickstart.yaml with smaller batches, fewer updates and no checkpoints.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import torch
from side_by_side import bare_trainer
from torch.utils.data import DataLoader

from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.modalities.text import TextDistillation
from opd_lightning.modalities.text.quickstart import sums
from opd_lightning.module import OnPolicyDistillation
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.optimization import LRSchedule
from opd_lightning.optimizer_step import MicroBatch
from opd_lightning.pretrained import Pretrained
from opd_lightning.reward import ExactMatch
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Frozen, Teacher
from opd_lightning.trajectory import Example

STUDENT, TEACHER = "opd:assets/quickstart/student", "opd:assets/quickstart/teacher"
HORIZON, HELD_OUT = 56, 128


class Problems(L.LightningDataModule):
    """Rows from memory, and held-out sums of four digits."""

    def __init__(self, rows: Sequence[Example], seed: int) -> None:
        super().__init__()
        self.rows, self.seed = rows, seed
        self.validation = sums(HELD_OUT, seed=1, held_out=True)

    def train_dataloader(self) -> Any:
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        return module.rollout_loader(self.rows, self.seed)

    def val_dataloader(self) -> Any:
        return DataLoader(self.validation, batch_size=HELD_OUT, collate_fn=list)  # type: ignore[arg-type]


@dataclass
class Curve(L.Callback):
    """What a run did: its rollouts by optimizer step, and what validation measured, by the updates that were done."""

    steps: list[dict[str, float]] = field(default_factory=list)
    held_out: dict[int, dict[str, float]] = field(default_factory=dict)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        rollouts = batch.trajectories
        stopped = rollouts.stopped.float().mean()
        self.steps.append({"tokens": float(rollouts.length.sum()), "stopped": float(stopped)})

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.held_out[trainer.global_step] = {n: float(v) for n, v in trainer.callback_metrics.items()}

    def accuracy(self, update: int) -> float:
        """Returns the held-out accuracy after so many updates, in per cent."""
        return 100 * self.held_out[update]["val/accuracy"]

    def tokens(self, update: int) -> float:
        """Sums the tokens, in thousands, that were generated for so many updates."""
        return sum(step["tokens"] for step in self.steps[:update]) / 1000

    def accuracy_at(self, tokens: float) -> float:
        """Returns the held-out accuracy after so many thousand tokens, on the line between two validations."""
        known = {self.tokens(update): self.accuracy(update) for update in self.held_out}
        return float(np.interp(tokens, list(known), list(known.values())))


def frozen(path: str) -> Teacher:
    return Teacher(Frozen(Pretrained(path)))


def make(
    terms: Sequence[Term],
    teachers: dict[str, Teacher] | None = None,
    student: Pretrained | None = None,
    rate: float = 1e-3,
    **rollout: Any,
) -> OnPolicyDistillation:
    """Builds the quickstart's module with these terms; ``rollout``: changes of its rollouts (32 of a batch)."""
    return TextDistillation(
        student=student or Pretrained(STUDENT),
        teachers=teachers if teachers is not None else {"teacher": frozen(TEACHER)},
        objective=Objective(list(terms)),
        rollout=Rollout(**{"batch_size": 32, "horizon": HORIZON} | rollout),
        evaluation=Evaluation(before=False, horizon=HORIZON),
        reward=ExactMatch(after="#"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0),
        schedule=LRSchedule("linear", warmup_steps=5),
    )


def train(
    module: OnPolicyDistillation,
    seed: int,
    updates: int = 60,
    every: int | None = None,
    rows: Sequence[Example] | None = None,
    callbacks: Sequence[L.Callback] = (),
) -> Curve:
    """Trains for so many updates, and measures held-out accuracy after ``every`` of them (default: at the end)."""
    L.seed_everything(seed, verbose=False)
    curve = Curve()
    with tempfile.TemporaryDirectory() as folder:
        trainer = bare_trainer(
            updates,
            folder,
            *callbacks,
            curve,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            val_check_interval=every or updates,
            check_val_every_n_epoch=None,
            gradient_clip_val=1.0,
        )
        trainer.fit(module, datamodule=Problems(sums(4000, seed=seed) if rows is None else rows, seed))
    return curve


@functools.cache
def full_rollouts(seed: int) -> Curve:
    """Trains by KL(student‖teacher) on whole rollouts: what several claims compare with."""
    return train(make([Term(ReverseKL())]), seed, every=20)
