"""StepProgress: how far a run is, on a terminal as a bar, elsewhere as a line every so often."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from .metrics import is_logged
from .printable import printable
from .progress import NARRATOR, Phase, duration

SHOWN = {
    "train/reward": "reward {:.3f}",
    "train/lr": "lr {:.1e}",
    "train/gradient_norm": "gradient {:.2g}",
    "time/step_s": "{:.2g} s/step",
    "time/rollout_share": "{:.0%} rollouts",
    "speed/rollout_steps_per_s": "{:,.0f} {unit}/s of them",
    "time/waited_worker_share": "{:.0%} waiting for the worker",
    "time/waited_server_share": "{:.0%} waiting for servers",
    "work/mfu": "MFU {:.0%}",
    "train/{unit}_so_far": "{:,.0f} {unit} so far",
}
"""What a line says besides losses, in order."""

HEADLINES = ("val/accuracy", "val/pass@", "val/length", "val/retention/")
"""What the line of a validation says, in order; names that begin so, but for those by category."""


class StepProgress(ProgressBar):
    """Counts the optimizer steps of the whole run, also after a resume, with the time that is left.

    On a terminal a bar stands below what is printed; elsewhere a line comes with each logged step. Validation has its
    line, and the last ones say where everything is and what to type next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_on = True
        self._bar: Progress | None = None
        self._open, self._evaluation, self._phase = ExitStack(), ExitStack(), Phase("evaluating")
        self._first = self._told = 0
        self._trained, self._scored = False, 0
        self._since = 0.0
        self._training = Phase("training")

    def disable(self) -> None:
        self.is_on = False

    def enable(self) -> None:
        self.is_on = True

    # -- training ------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first = self._told = trainer.global_step
        self._trained, self._scored = True, trainer.global_step
        self._since = time.monotonic()
        if not self.is_on:
            return
        self._training = self._open.enter_context(NARRATOR.phase("training, optimizer steps"))
        if sys.stdout.isatty():
            self._bar = bar()
            self._bar.start()
            self._bar.add_task("", total=steps_of(trainer), completed=self._first)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self._first:  # what is evaluated before training does not make steps slower
            self._since = self._training.began = time.monotonic()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._tell(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tell(trainer, pl_module)
        self._close()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.is_on and trainer.global_step:
            lines = [*self._unexpected(trainer), *whereabouts(trainer)]
            sys.stdout.write(printable("".join(f"{line}\n" for line in lines)))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._open.close()

    def _tell(self, trainer: L.Trainer, module: Any) -> None:
        """Moves the bar to the steps that are done, or prints a line of the last one if it was logged."""
        step = trainer.global_step
        if not self.is_on or step == self._told:
            return
        self._told = step
        NARRATOR.advance(step, steps_of(trainer) or step)
        text = line(trainer, module) if is_logged(trainer, step) else ""
        if self._bar is not None:
            (task,) = self._bar.task_ids
            rest = text.partition(" · ")[2]  # the bar itself has the step
            self._bar.update(task, completed=step, description=rest or self._bar.tasks[0].description)
        elif text:
            NARRATOR.heard()
            sys.stdout.write(printable(f"{text}{self._left(trainer)}\n"))
            sys.stdout.flush()

    def _unexpected(self, trainer: L.Trainer) -> list[str]:
        """Says what a run that has ended did not do."""
        steps = trainer.global_step
        if not self._trained:
            limit = f"trainer.max_steps={trainer.max_steps}"
            return [f"nothing was trained: the checkpoint has {steps:,} optimizer steps, and {limit}"]
        batches: Any = trainer.num_val_batches
        if self._scored == steps or not trainer.enable_validation or not np.sum(batches):
            return []
        config = shlex.quote(str(Path(trainer.default_root_dir) / "config.yaml"))
        return [
            f"not scored after step {steps:,}: trainer.val_check_interval={trainer.val_check_interval} comes later; "
            f"`opd validate -c {config} --ckpt_path=last` does it"
        ]

    def _left(self, trainer: L.Trainer) -> str:
        total, step = steps_of(trainer), trainer.global_step
        if total is None or step == self._first:
            return ""
        seconds = (time.monotonic() - self._since) / (step - self._first) * (total - step)
        return f" · {duration(seconds)} left"

    # -- evaluation ----------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tell(trainer, pl_module)
        self._begin("validating", trainer.num_val_batches)

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._next()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()
        if self.is_on and not trainer.sanity_checking:
            self._scored = trainer.global_step
            metrics = trainer.callback_metrics
            names = [name for headline in HEADLINES for name in metrics if _is_headline(name, headline)]
            values = [f"{name} {float(metrics[name]):.3f}" for name in names]
            NARRATOR.heard()
            sys.stdout.write(printable(f"step {trainer.global_step:,}: {', '.join(values) or 'validated'}\n"))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("testing", trainer.num_test_batches)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._next()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("predicting", trainer.num_predict_batches)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._next()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    def _begin(self, what: str, batches: Any) -> None:
        counts = [count for count in (batches if isinstance(batches, list) else [batches]) if count != float("inf")]
        self._evaluation = ExitStack()
        if self.is_on:
            self._phase = self._evaluation.enter_context(NARRATOR.phase(f"{what}, batches", int(sum(counts)) or None))

    def _next(self) -> None:
        if self.is_on:
            self._phase.done += 1

    def _end(self) -> None:
        self._evaluation.close()


def _is_headline(name: str, headline: str) -> bool:
    """Tells whether a metric is one of a headline, and not of one category."""
    rest = name.removeprefix(headline)
    return name.startswith(headline) and "/" not in rest and (not rest or headline[-1] in "@/")


def bar() -> Progress:
    """Makes a bar with step, time and what is left of it; a logged step is told in the room that a terminal leaves."""
    columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(12), TimeElapsedColumn(), TextColumn("left")
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    text = TextColumn("{task.description}", markup=False, table_column=rest)
    return Progress(*columns, TimeRemainingColumn(), text, expand=True)


def steps_of(trainer: L.Trainer) -> int | None:
    """Counts the optimizer steps of the whole run; None: nobody knows."""
    if trainer.max_steps > 0:
        return trainer.max_steps
    if (trainer.max_epochs or -1) > 0 and trainer.num_training_batches != float("inf"):
        return int(trainer.max_epochs or 0) * int(trainer.num_training_batches) // trainer.accumulate_grad_batches
    return None


def line(trainer: L.Trainer, module: Any) -> str:
    """Formats a logged step in a line."""
    metrics, unit, total = module.metrics.logged, module.unit, steps_of(trainer)
    parts = [f"step {trainer.global_step:,}" + (f"/{total:,}" if total else "")]
    parts += [f"{n.removeprefix('train/loss/')} {v:.4g}" for n, v in metrics.items() if n.startswith("train/loss/")]
    for name, form in SHOWN.items():
        if (value := metrics.get(name.format(unit=unit))) is not None:
            parts.append(form.format(value, unit=unit))
    return " · ".join(parts)


def whereabouts(trainer: L.Trainer) -> list[str]:
    """Lists where a run has left what, and what to type next."""
    folder = Path(trainer.default_root_dir)
    tables = [Path(logger.log_dir) / "metrics.csv" for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    there = {"samples": folder / "samples.jsonl", "metrics": next(iter(tables), None), "config": folder / "config.yaml"}
    lines = [f"{name}: {path}" for name, path in there.items() if path is not None and path.exists()]
    if there["metrics"] is not None and there["config"] is not None and there["config"].exists():
        own, config = shlex.quote(str(folder)), shlex.quote(str(there["config"]))
        lines.append(
            f"next: opd report {own}, which writes {folder / 'report.html'}; more steps: opd fit -c {config} "
            "--ckpt_path=last --trainer.max_steps=…"
        )
    return lines
