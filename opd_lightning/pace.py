"""Pace: the time that a run will take, measured on its first updates and on some of its held-out rows."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from .evaluation import BATCH_SIZE, Evaluator
from .progress import duration
from .retention import Retention
from .rows import row_of
from .splits import rows_of
from .step_progress import steps_of

TIMED, MOST = 5.0, 50
"""Seconds and updates after which no further generation batch is timed; one is in any case."""


class Pace:
    """Times a run: the updates of its first generation batch warm up, those of the next ones count.

    Whole generation batches are timed, since one may serve several updates, of which only the first waits for rollouts;
    and at the run's own `log_every_n_steps`, since a logged step measures more.

    Args:
        trainer: of the run, whose validations are set up.
        module: of the run.
        before: whether student and teachers are scored before the first step.

    Attributes:
        seconds: of each update so far.
    """

    def __init__(self, trainer: L.Trainer, module: Any, before: bool) -> None:
        self.trainer, self.module, self.before = trainer, module, before
        _, batches = module.rollout.micro_batches(trainer.accumulate_grad_batches)
        self.cycle = batches // trainer.accumulate_grad_batches * module.rollout.epochs
        self.held_out = rows_of(trainer, "validation", "opd check") or []
        self.size = getattr(getattr(trainer, "datamodule", None), "validation_batch_size", BATCH_SIZE)
        self.validations = validations_of(trainer)
        self.seconds: list[float] = []
        self._since = time.perf_counter()

    def begin(self) -> None:
        """Begins the first update."""
        self._since = time.perf_counter()

    def update(self) -> bool:
        """Ends an update, and tells whether enough of them were timed."""
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now
        timed = self.seconds[self.cycle :]
        is_whole = bool(timed) and len(timed) % self.cycle == 0
        return is_whole and (sum(timed) >= TIMED or len(timed) >= MOST)

    @property
    def per_update(self) -> float:
        """Seconds an update; where the run was over after its first generation batch, those of that."""
        timed = self.seconds[self.cycle :] or self.seconds
        return sum(timed) / len(timed)

    def to_end(self) -> tuple[float, float]:
        """Computes seconds to the end: of updates, and of validations before and between; 0 where nobody knows an end.

        A batch of held-out rows is validated for it.
        """
        return self.per_update * (steps_of(self.trainer) or 0), self._validating() if self.held_out else 0.0

    def said(self) -> str:
        """Formats the time to the end."""
        text, steps = f"{self.per_update:.2g} s an update", steps_of(self.trainer)
        if steps is None:
            return text
        updates, validations = self.to_end()
        text += f", {duration(updates)} for {steps:,} of them"
        if validations:
            text += f" and {duration(validations)} for validations: {duration(updates + validations)} in all"
        return text

    def _validating(self) -> float:
        """Computes the seconds of all validations: those of the student, and of teachers, which are scored once."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        others = sum(len(callback.rows) for callback in callbacks if isinstance(callback, Retention))
        limited = min(len(self.held_out), int(sum(self.trainer.num_val_batches)) * self.size)
        total = 0.0
        if self.validations or self.before:
            # the first batch of a validation is looked at more closely
            first = self._batch("student", 0)
            again = self._batch("student", 1) if first < TIMED else first
            total += (self.validations + self.before) * max(first - again, 0.0)
            rows = self.validations * (limited + others) + self.before * (len(self.held_out) + others)
            total += again / self._count * rows
        for teacher in self.module.evaluator.scored_before if self.before else ():
            total += self._batch(teacher, 1) / self._count * len(self.held_out)
        return total

    @property
    def _count(self) -> int:
        return min(len(self.held_out), self.size)

    def _batch(self, who: str, index: int) -> float:
        """Times a validation of the first batch of held-out rows, in seconds; 0 where a teacher is shown nothing."""
        evaluator: Evaluator = self.module.evaluator
        stage, rows = "val", [dict(row_of(self.held_out, i)) for i in range(self._count)]
        if who != "student":
            stage, rows = f"val/{who}", [row for row in rows if self.module.teachers[who].look(row) is not None]
        if not rows:
            return 0.0
        since = time.perf_counter()
        evaluator.step(stage, who, rows, index)
        evaluator.finish(stage)
        return (time.perf_counter() - since) / len(rows) * self._count


def validations_of(trainer: L.Trainer) -> int:
    """Counts the validations between the first step and the last one."""
    steps, every = steps_of(trainer), getattr(trainer, "val_check_batch", None)
    if steps is None or not sum(trainer.num_val_batches):
        return 0
    batches = steps * trainer.accumulate_grad_batches
    per_epoch = trainer.num_training_batches
    if every is not None and every != float("inf"):
        return int(batches // every)
    return 0 if per_epoch == float("inf") else int(batches // per_epoch)
