"""Curriculum: one mechanism for everything that changes over training time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from ..module import OnPolicyDistillation
from .knobs import KnobCallback, read, turn


class Schedule(ABC):
    """A value over optimiser steps: a function of their number alone, so that resuming needs nothing remembered."""

    changes: frozenset[int] = frozenset({0})
    """Optimiser steps at which its value is of interest: where it begins, ends and jumps."""

    @abstractmethod
    def __call__(self, step: int) -> Any:
        """The value for the optimiser step after ``step`` ones were done."""


class Linear(Schedule):
    """From ``start`` to ``end`` in ``steps`` optimiser steps after the first ``wait``, then ``end``.

    Raises:
        ValueError: steps < 1 or wait < 0.
    """

    def __init__(self, start: float, end: float, steps: int, wait: int = 0) -> None:
        if steps < 1 or wait < 0:
            raise ValueError(f"{type(self).__name__}: steps must be >= 1 and wait >= 0, got {steps} and {wait}")
        self.start, self.end, self.steps, self.wait = start, end, steps, wait
        self.changes = frozenset({0, wait + steps})

    def share(self, step: int) -> float:
        """How much of the way is gone, in [0, 1]."""
        return min(1.0, max(0, step - self.wait) / self.steps)

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * self.share(step)


class Cosine(Linear):
    """Like `Linear`, along half a cosine: slow at both ends."""

    def share(self, step: int) -> float:
        return (1 - math.cos(math.pi * super().share(step))) / 2


class Piecewise(Schedule):
    """Values from given optimiser steps on, such as ``{0: 1.0, 500: 0.0}``; any type, so also ``{student: 1.0}``.

    Args:
        values: optimiser step → value; 0 must be among them.
        interpolate: straight lines between the numbers instead of jumps.

    Raises:
        ValueError: no value for step 0, a negative step, or lines between what are no numbers.
    """

    def __init__(self, values: dict[int, Any], interpolate: bool = False) -> None:
        if 0 not in values or min(values) < 0:
            raise ValueError(f"Piecewise.values needs a value for step 0 and none before it, got {sorted(values)}")
        if interpolate and not all(isinstance(value, int | float) for value in values.values()):
            raise ValueError("Piecewise.interpolate: only numbers can be interpolated")
        self.values, self.interpolate = dict(sorted(values.items())), interpolate
        self.changes = frozenset(values)

    def __call__(self, step: int) -> Any:
        before = max(at for at in self.values if at <= step)
        later = [at for at in self.values if at > step]
        if not self.interpolate or not later:
            return self.values[before]
        share = (step - before) / (later[0] - before)
        return self.values[before] + (self.values[later[0]] - self.values[before]) * share


class OnPlateau(Schedule):
    """A further value of a list whenever a metric has not improved for a number of validations.

    Args:
        monitor: a logged metric, such as ``val/accuracy``.
        values: the first one is the start.
        patience: validations without improvement before the next value. Default 3.
        min_delta: what counts as improvement. Default 0.
        mode: "max" or "min".

    Raises:
        ValueError: no values, patience < 1, or another mode.
    """

    def __init__(
        self, monitor: str, values: list[Any], patience: int = 3, min_delta: float = 0.0, mode: str = "max"
    ) -> None:
        if not values or patience < 1 or mode not in ("max", "min"):
            got = f"got {values}, {patience} and {mode}"
            raise ValueError(f"OnPlateau: values must not be empty, patience >= 1 and mode max or min; {got}")
        self.monitor, self.values, self.patience, self.min_delta, self.mode = monitor, values, patience, min_delta, mode
        self.place, self.waited, self.best = 0, 0, -math.inf

    def __call__(self, step: int) -> Any:
        return self.values[self.place]

    def see(self, metric: float) -> None:
        """One validation's value."""
        signed = metric if self.mode == "max" else -metric
        if signed > self.best + self.min_delta:
            self.best, self.waited = signed, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.place, self.waited = min(self.place + 1, len(self.values) - 1), 0


class Curriculum(KnobCallback):
    """Turns knobs along schedules: the horizon, a term's coefficient (0 skips its teacher's forward pass), who acts, a
    divergence's β, an EMA rate, …

    A knob is turned after an optimiser step and before the next rollout. Numbers are logged as ``knob/<path>``. Several
    knobs with `Piecewise` schedules are the stages of a run (off-policy forward KL, then on-policy reverse KL, …); a
    resumed run is in the stage where it was.

    Args:
        schedules: path of a knob → schedule.

    Raises:
        ValueError: no schedules; before training, a knob that is not there, that refuses a value of its schedule or
            that another callback turns, and a later stage that needs what the run does not offer; when validated, a
            metric that nobody logs.
    """

    def __init__(self, schedules: dict[str, Schedule]) -> None:
        if not schedules:
            raise ValueError("Curriculum.schedules is empty; name a knob, such as rollout.horizon, and its schedule")
        self.schedules = schedules

    @property
    def knobs(self) -> tuple[str, ...]:
        return tuple(self.schedules)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._rehearse(trainer, pl_module)

    def _rehearse(self, trainer: L.Trainer, module: Any) -> None:
        """Every value once, so that what is refused is refused now; ends at those of step 0."""
        needed: dict[str, str] = {}
        for step in sorted({0}.union(*(schedule.changes for schedule in self.schedules.values())), reverse=True):
            self._turn(module, step)
            module.check()
            needed |= module.required_columns()
        for knob, schedule in self.schedules.items():
            for value in schedule.values if isinstance(schedule, OnPlateau) else ():
                turn(module, knob, value)
        self._turn(module, 0)
        columns = getattr(getattr(getattr(trainer, "datamodule", None), "train", None), "column_names", None)
        for column, who in needed.items():
            if columns is not None and column not in columns:
                raise ValueError(f"a stage of the curriculum needs the column {column!r} ({who}), which the data lacks")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._turn(pl_module, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._turn(pl_module, trainer.global_step)
        for knob in self.schedules:
            value = read(pl_module, knob)  # type: ignore[arg-type]
            if isinstance(value, int | float):
                pl_module.log(f"knob/{knob}", float(value))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for schedule in self.schedules.values():
            if isinstance(schedule, OnPlateau):
                if schedule.monitor not in trainer.callback_metrics:
                    known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
                    raise ValueError(f"OnPlateau.monitor: nothing logs {schedule.monitor!r}; there are {known}")
                schedule.see(float(trainer.callback_metrics[schedule.monitor]))
        if trainer.state.fn == TrainerFn.FITTING:
            self._turn(pl_module, trainer.global_step)

    def _turn(self, module: Any, step: int) -> None:
        assert isinstance(module, OnPolicyDistillation)
        for knob, schedule in self.schedules.items():
            turn(module, knob, schedule(step))

    def state_dict(self) -> dict[str, Any]:
        return {
            knob: {"place": schedule.place, "waited": schedule.waited, "best": schedule.best}
            for knob, schedule in self.schedules.items()
            if isinstance(schedule, OnPlateau)
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for knob, state in state_dict.items():
            vars(self.schedules[knob]).update(state)
