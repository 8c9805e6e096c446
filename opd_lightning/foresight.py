"""Foresight: what is found out about a run before its first step, and in a few updates that nobody keeps.

Shape legend: B trajectories, T steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from .audit import shows_nothing_more
from .finding import Finding
from .forecast import RESERVED, memory, memory_here
from .module import OnPolicyDistillation
from .note import written_by
from .objective import ReverseKL
from .optimizer_step import MicroBatch
from .pace import Pace
from .rollout_settings import derived_seed
from .rows import reason_of, row_of
from .splits import rows_of
from .trajectory import Example, Trajectories

ROWS, LOOKED_AT = 4, 64
"""Rows that are acted on, and rows that views and boxes are looked at of."""
CHECK_DRAWS = 2**34  # keeps the seeds apart from those of rollouts, evaluation and agreement
FAR_APART = 3.0
"""Nats of KL(student‖teacher) at the first step above which the student hardly samples what the teacher wants."""
CUT = 0.2
"""Share of rollouts that end by themselves below which the horizon is worth a doubt; chosen."""


@dataclass(frozen=True)
class Look:
    """Look at a run: its module and trainer, some rows, and what the student did on the first of them.

    Attributes:
        module: of the run, with its models loaded.
        trainer: of the run.
        rows: up to `LOOKED_AT` training rows.
        acted: the student's rollouts on the first `ROWS` of them.
        folder: where pictures go.
    """

    module: OnPolicyDistillation
    trainer: L.Trainer
    rows: list[Example]
    acted: Trajectories
    folder: Path


Check = Callable[[Look], Iterator[Finding]]
CHECKS: list[Check] = []
"""Checks in the order of their lines; a setting has its own (`Setting.findings`), and a package may append more."""


def check(function: Check) -> Check:
    """Registers a check."""
    CHECKS.append(function)
    return function


@check
def models(look: Look) -> Iterator[Finding]:
    """Says that models were loaded and fit together, which `audit` refuses otherwise."""
    names = ", ".join(f"{name} {policy.path}" for name, policy in look.module.policies.items())
    yield Finding("models", "good", f"loaded, and they read the same actions: {names}")


@check
def rows(look: Look) -> Iterator[Finding]:
    """Counts rows, and how often each is trained on."""
    data = getattr(look.trainer, "datamodule", None)
    train, held_out = (rows_of(look.trainer, split, "opd check") for split in ("train", "validation"))
    count, steps = len(train or ()), look.trainer.max_steps
    text = f"{count:,} to train on, {len(held_out or ()):,} held out"
    if skipped := sum(getattr(data, "skipped", {}).values()):
        text += f", {skipped:,} skipped"
    if steps > 0 and count:
        _, per_generation = look.module.rollout.micro_batches(look.trainer.accumulate_grad_batches)
        updates = per_generation // look.trainer.accumulate_grad_batches * look.module.rollout.epochs
        prompts = steps / updates * look.module.rollout.batch_size
        times = f"{prompts / count:.2g}"
        text += f"; {steps:,} steps see each {'once' if times == '1' else f'{times} times'}"
    advice = "" if held_out else "without data.validation nothing says whether it helped: 0.1 holds a tenth out"
    yield Finding("rows", "good" if held_out else "doubtful", text, advice)


@check
def views(look: Look) -> Iterator[Finding]:
    """Compares what each teacher is shown with what the student is shown."""
    for name, teacher in look.module.teachers.items():
        if teacher.view is None and not teacher.where:
            continue
        if teacher.view is not None and set(teacher.view.columns) & set(written_by(look.module.notes)):
            yield Finding("view", "told", f"{name} is shown what notes say of rollouts, which are not there yet")
            continue
        known = sum(teacher.look(row) is not None for row in look.rows)
        same = sum(shows_nothing_more(look.module, name, row) for row in look.rows)
        text = f"{name} is shown something in {known} of the first {len(look.rows)} rows"
        if not known:
            advice = "its view or `where` names columns that are empty or have other values there"
            yield Finding("view", "bad", text, advice)
        elif literal := _literal(name, look):
            text = f"{text}, and that has {', '.join(f'{{ {column} }}' for column in literal)} in it, word for word"
            yield Finding("view", "doubtful", text, f"columns are written with two braces: {{{{ {literal[0]} }}}}")
        elif same:
            text = f"{text}; in {same} it is what the student sees"
            yield Finding("view", "doubtful", text, _unnamed(name, teacher.view, look.rows[0]))
        else:
            yield Finding("view", "good", f"{text}, and it differs from what the student sees")


def _literal(name: str, look: Look) -> list[str]:
    """Lists columns of the first row that a teacher is shown something in, where that has them in single braces."""
    teacher = look.module.teachers[name]
    row, view = next((row, view) for row in look.rows if (view := teacher.look(row)) is not None)
    changed = " ".join(str(value) for column, value in view.items() if value is not row.get(column))
    return sorted(set(re.findall(r"\{\s*(\w+)\s*\}", changed)) & set(row))


def _unnamed(name: str, view: Any, row: Example) -> str:
    """Asks for the column that a teacher's view was to show, and names those of the first row that it does not."""
    named = set(view.columns) if view is not None else set()
    others = ", ".join(sorted(set(row) - named - {"prompt"})) or "none"
    return f"does model.teachers.{name}.view name the column that it is to show? The rows also have: {others}"


@check
def own(look: Look) -> Iterator[Finding]:
    """Asks the setting."""
    yield from look.module.findings(look.rows, look.acted, look.folder)


@check
def divergence(look: Look) -> Iterator[Finding]:
    """Measures KL(student‖teacher) by position, and doubts reverse KL where the first step's is large."""
    if "categorical" not in look.module.provides:
        return
    for name in sorted(look.module.objective.teachers() & look.module.policies.keys()):  # others tell too little
        values = look.module.per_step(look.acted, ReverseKL(), name)
        if values.isnan().all():
            yield Finding("first KL", "doubtful", f"{name} has nothing to say of the first {ROWS} rows")
            continue
        first = float(values[:, :1].nanmean())
        text = f"{name}: {positions(values)} nats of KL(student‖teacher) at steps 1, 2–4, 5–16, later"
        terms = look.module.objective.terms
        reverse = any(isinstance(term.signal, ReverseKL) and name in term.teachers for term in terms)
        if reverse and first > FAR_APART:
            advice = (
                "a student that never samples what the teacher wants learns nothing of it from reverse KL: take "
                "ForwardKL or JSD, or let the teacher act on some prompts (rollout.behavior)"
            )
            yield Finding("first KL", "doubtful", text, advice)
        elif float(values.nanmean()) < 1e-6:
            advice = "the teacher says the same as the student; there is nothing to learn from it yet"
            yield Finding("first KL", "doubtful", text, advice)
        else:
            yield Finding("first KL", "good", text)


def positions(values: Tensor) -> str:
    """Formats means over spans of positions of values ``[B, T]``."""
    spans = (values[:, :1], values[:, 1:4], values[:, 4:16], values[:, 16:])
    return ", ".join("–" if span.isnan().all() else f"{float(span.nanmean()):.2g}" for span in spans)


def forecast(trainer: L.Trainer, module: OnPolicyDistillation, room: float | None) -> Iterator[Finding]:
    """Computes memory, for the device that is there or for a GPU of ``room`` bytes."""
    device = trainer.strategy.root_device
    reserved = RESERVED if room is not None or device.type != "cpu" else 0.0
    try:
        computed = module.forecast(trainer, room)
        if computed is None:
            why = "" if module.policies else " without loaded models: leave out --plan"
            yield Finding("memory", "told", f"{type(module).__name__} does not compute it{why}")
        else:
            yield from memory(computed, memory_here(device) if room is None else room, reserved)
    except Exception as error:  # the code of some model may not run without contents; the run itself is not concerned
        yield Finding("memory", "told", f"can't be computed for this model: {reason_of(error)}")


def bad_rows(data: Any) -> Iterator[Finding]:
    """Tells the rows that a run will refuse, each with its place; where there are many, the first, and how many."""
    advice = "correct the row, or leave such rows out: data.on_bad_row: skip"
    for bad in getattr(data, "refused", ()):
        for text in bad.said:
            yield Finding("bad row", "bad", text, advice)
        if (more := bad.kinds.total() - len(bad.said)) > 0:
            kinds = ", ".join(f"{count} × {kind}" for kind, count in bad.kinds.most_common())
            yield Finding("bad rows", "bad", f"{bad.key}: {more:,} more; in all {kinds}", advice)


class Foresight(L.Callback):
    """Callback that checks a run before its first step, times updates and a validation, and ends it.

    Args:
        folder: where pictures go.
        room: bytes of the GPU that memory is computed for; None: the device that is there.
    """

    def __init__(self, folder: Path, room: float | None = None) -> None:
        self.folder, self.room = folder, room
        self.data: Any = None  # the run's data module, known before it reads anything
        self.findings: list[Finding] = []
        self.pace: Pace | None = None
        self._before = False

    def all(self) -> list[Finding]:
        """Lists what was found, bad rows first."""
        return [*bad_rows(self.data), *self.findings]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, OnPolicyDistillation)
        self._before, pl_module.evaluation.before = pl_module.evaluation.before, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks; comes before the module's own hook, which compares rollouts with their replay."""
        assert isinstance(pl_module, OnPolicyDistillation)
        train = rows_of(trainer, "train", "opd check") or []
        examples: list[Example] = [row_of(train, i) for i in range(min(len(train), LOOKED_AT))]
        some = examples[:ROWS]
        acted = pl_module.act("student", some, [derived_seed(CHECK_DRAWS, i) for i in range(len(some))])
        for finder in CHECKS:
            self.findings += finder(Look(pl_module, trainer, examples, acted, self.folder))
        self.findings += forecast(trainer, pl_module, self.room)
        self.pace = Pace(trainer, pl_module, self._before)
        trainer.limit_val_batches = 0  # not earlier: Lightning checks and counts validations until here

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 and trainer.global_step == 0 and self.pace is not None:
            text = "what is sampled has the log-probs of its replay, alone, beside others and in training mode"
            self.findings.append(Finding("agreement", "good", text))
            self.pace.begin()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        if batch.is_last and self.pace is not None:
            trainer.should_stop = self.pace.update()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, OnPolicyDistillation)
        if self.pace is not None and self.pace.seconds:
            self.findings += list(speed(pl_module, self.pace))


def speed(module: OnPolicyDistillation, pace: Pace) -> Iterator[Finding]:
    """Tells how long the run will take, and how many rollouts the horizon cut."""
    metrics = module.metrics.logged | module.metrics.of_step(module.ranks)  # with what was not logged yet
    rate, share = metrics.get("speed/rollout_steps_per_s"), metrics.get("time/rollout_share")
    acting = (
        ""
        if rate is None or share is None
        else f"; {share:.0%} of an update are rollouts, of {rate:,.0f} {module.unit}/s"
    )
    yield Finding("time", "told", f"{pace.said()}{acting}")
    stopped, length = metrics.get("train/stopped"), metrics.get("train/length", 0.0)
    if stopped is not None:
        horizon, unit = module.rollout.horizon, module.unit
        text = f"{stopped:.0%} end by themselves before the horizon {horizon}, {length:.0f} {unit} long"
        advice = "" if stopped >= CUT else "a student that is cut learns no end: raise rollout.horizon"
        yield Finding("rollouts", "doubtful" if advice else "good", text, advice)
    if (failures := metrics.get("train/failures")) is not None:
        text = f"{failures:.2g} of {metrics['train/turns']:.2g} turns of a rollout failed"
        advice = f"model.environment: {type(module.environment).__name__} failed, and the warning above says how"
        yield Finding("environment", *(("bad", text, advice) if failures else ("good", text)))
