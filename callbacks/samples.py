"""Samples: rollouts to look at, every so many optimizer steps."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..callback import DistillationCallback
from ..module import OnPolicyDistillation
from ..objective import CrossEntropy, ReverseKL, Signal
from ..optimizer_step import OptimizerStep
from ..printable import cell, in_markdown
from ..teacher_reading import TeacherReading
from ..trajectory import Trajectories

WHOLE = 1_000_000
"""Characters of what a policy read that are kept: all that there are."""
COLUMNS = ("prompt", "completion", "reward", "length", "signal")
Row = dict[str, Any]


class Samples(DistillationCallback):
    """Shows the first rollouts of an optimizer step as they are about to be trained, with a signal at each step.

    On the console the steps are shaded by the signal, the darkest red being the table's largest. The same rows go to
    ``rollouts.jsonl`` in the run's folder, with every step's value, the teacher's log-prob of the step and its
    likeliest ones there (`opd report` shows them), what each policy read (``read``, of language models), what notes say
    of it (``notes``), who acted, with which weights (``version``), how many optimizer steps ago
    (``lag``) and what the trajectory counts (``weight``; if a callback sets it, list that one first). Loggers that take
    text get them too: TensorBoard, Weights & Biases and MLflow. A resumed run replaces the rows of the steps that it
    does again.

    Example::

        callbacks+:
          - class_path: Samples
            init_args: {every: 50, count: 8}

    Args:
        every: optimizer steps between tables, from the first on. Default 100.
        count: rollouts, at most one optimizer step's on the first rank. Default 4.
        signal: default: KL(student‖teacher), or without a teacher −log p of the step taken.
        teacher: an entry of ``model.teachers`` whom the signal reads; None: it reads none.
        console: print the tables.
        likeliest: how many of the teacher's likeliest steps are written beside each step, where it tells whole
            distributions over the student's vocabulary and the signal reads them. Default 5.

    Raises:
        ValueError: every or count < 1, likeliest < 0, a signal that needs a teacher without one; when training begins,
            a teacher that is not there or a vocabulary that the setting doesn't have.
    """

    def __init__(
        self,
        every: int = 100,
        count: int = 4,
        signal: Signal | None = None,
        teacher: str | None = "teacher",
        console: bool = True,
        likeliest: int = 5,
    ) -> None:
        if min(every, count) < 1 or likeliest < 0:
            raise ValueError(f"Samples: every={every} and count={count} must be >= 1, and likeliest={likeliest} >= 0")
        self.signal = signal or (CrossEntropy() if teacher is None else ReverseKL())
        if teacher is None and "teacher" in self.signal.needs:
            raise ValueError(f"Samples.signal: {type(self.signal).__name__} needs a teacher; name one")
        self.every, self.count, self.teacher, self.console = every, count, teacher, console
        self.likeliest = likeliest
        self.asks = frozenset() if teacher is None else frozenset({teacher})
        self.distributions = self.asks if "distribution" in self.signal.needs else frozenset()

    def check(self, module: OnPolicyDistillation) -> None:
        if self.teacher is not None and self.teacher not in module.teachers:
            known = sorted(module.teachers)
            raise ValueError(f"Samples.teacher: no {self.teacher!r} in model.teachers, which has {known}")
        if "categorical" in self.signal.needs - module.provides:
            raise ValueError(
                f"Samples.signal: {type(self.signal).__name__} needs a vocabulary, which this setting lacks"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _forget(self._path(trainer), trainer.global_step)

    def on_optimizer_step_start(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        if module.global_step % self.every:
            return
        rows: list[Row] = []
        for trajectories in step.trajectories:
            wanted = min(len(trajectories), self.count - len(rows))
            if wanted:
                rows += self._rows(module, trajectories.to("cpu").select(torch.arange(wanted)))
        self._publish(module.trainer, rows)

    def _rows(self, module: OnPolicyDistillation, shown: Trajectories) -> list[Row]:
        reading = TeacherReading(self.signal, self.likeliest if self.distributions else 0)
        values = module.per_step(shown, reading, self.teacher)
        read, spelled = module.actor.checked_rewards(shown)[1], module.decode_steps(shown)
        log_probs, likeliest = reading.of(module, shown)
        rows = []
        for i, (mask, version) in enumerate(zip(shown.mask, shown.weights_version.tolist(), strict=True)):
            signal = values[i][mask].double()
            rows.append(
                {
                    "step": module.global_step,
                    "prompt": str(read[i].get("prompt", "")),
                    "completion": str(read[i].get("completion", "")),
                    "reward": None if shown.reward is None or shown.reward[i].isnan() else float(shown.reward[i]),
                    "length": int(mask.sum()),
                    "signal": None if signal.isnan().all() else float(signal.mean()),
                    "stopped": bool(shown.stopped[i]),
                    "source": shown.sources[int(shown.source[i])],
                    "version": version,
                    "lag": module.global_step - version,
                    "weight": 1.0 if shown.weight is None else float(shown.weight[i]),
                    "notes": {} if shown.notes is None else shown.notes[i],
                    "read": dict(module.readings(shown.examples[i], WHOLE)),
                    "steps": None if spelled is None else spelled[i],
                    # NaN is no JSON
                    "signals": [None if value != value else value for value in signal.tolist()],
                    "teacher_log_probs": log_probs and log_probs[i],
                    "likeliest": likeliest and likeliest[i],
                }
            )
        return rows

    @rank_zero_only
    def _publish(self, trainer: L.Trainer, rows: list[Row]) -> None:
        self._path(trainer).parent.mkdir(parents=True, exist_ok=True)
        with self._path(trainer).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if self.console:
            Console().print(render(rows, f"optimizer step {trainer.global_step}: {type(self.signal).__name__}"))
        data = [[row[name] for name in COLUMNS] for row in rows]
        logger: Any
        for logger in trainer.loggers:
            experiment = logger.experiment
            if hasattr(logger, "log_table"):  # Weights & Biases
                logger.log_table("rollouts", columns=list(COLUMNS), data=data, step=trainer.global_step)
            elif hasattr(experiment, "add_text"):  # TensorBoard
                experiment.add_text("rollouts", markdown(data), trainer.global_step)
            elif hasattr(experiment, "log_text"):  # MLflow
                experiment.log_text(logger.run_id, markdown(data), f"rollouts/step-{trainer.global_step}.md")

    @staticmethod
    def _path(trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "rollouts.jsonl"


@rank_zero_only
def _forget(path: Path, step: int) -> None:
    """Removes rows of the steps from ``step`` on, which are about to be done (again), and what a kill cut short."""
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]
    path.write_text("".join(line for line in lines if json.loads(line)["step"] < step), encoding="utf-8")


def render(rows: list[Row], title: str) -> Table:
    """Formats the table for the console."""
    table = Table(title=title, title_justify="left", show_lines=True)
    for name in COLUMNS:
        table.add_column(name)
    largest = max((abs(value) for row in rows for value in row["signals"] if value is not None), default=0.0) or 1.0
    for row in rows:
        completion = cell(row["completion"])
        if row["steps"] is not None:
            shaded = zip(row["steps"], row["signals"], strict=True)
            completion = Text.assemble(*(cell(piece, _shade(value, largest)) for piece, value in shaded))
        numbers = ("" if row[name] is None else f"{row[name]:.3g}" for name in COLUMNS[2:])
        table.add_row(cell(row["prompt"]), completion, *numbers)
    return table


def _shade(value: float | None, largest: float) -> str:
    if value is None:
        return ""
    rest = round(255 * (1 - abs(value) / largest))
    return f"black on rgb(255,{rest},{rest})"


def markdown(data: list[list[Any]]) -> str:
    """Formats a Markdown table of the rows' columns."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def text(value: Any) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else in_markdown(value)

    return "\n".join([line(list(COLUMNS)), line(["---"] * len(COLUMNS)), *(line(map(text, row)) for row in data)])
