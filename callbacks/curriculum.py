"""Curriculum: one mechanism for everything that changes over training time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from ..callback import Stateful
from ..module import OnPolicyDistillation
from ..optimizer_step import OptimizerStep
from ..splits import rows_of
from ..worker import refuse_teachers
from .knobs import KnobCallback


class Schedule(Stateful, ABC):
    """A value over optimizer steps."""

    @abstractmethod
    def __call__(self, step: int) -> Any:
        """Returns the value for the optimizer step after ``step`` ones were done."""

    @abstractmethod
    def ends(self) -> list[Any]:
        """Lists extreme values: if they can be served, all can."""

    def watch(self, metrics: Mapping[str, Any]) -> None:
        """Observes ``trainer.callback_metrics`` after every validation."""


class Linear(Schedule):
    """From ``start`` to ``end`` in ``steps`` optimizer steps after the first ``wait``, then ``end``.

    Raises:
        ValueError: steps < 1 or wait < 0.
    """

    def __init__(self, start: float, end: float, steps: int, wait: int = 0) -> None:
        if steps < 1 or wait < 0:
            raise ValueError(f"{type(self).__name__}: steps must be >= 1 and wait >= 0, got {steps} and {wait}")
        self.start, self.end, self.steps, self.wait = start, end, steps, wait

    def share(self, step: int) -> float:
        """Returns the share of the way that is done, in [0, 1]."""
        return min(1.0, max(0, step - self.wait) / self.steps)

    def __call__(self, step: int) -> float:
        share = self.share(step)
        return (1 - share) * self.start + share * self.end

    def ends(self) -> list[Any]:
        return [self.start, self.end]


class Cosine(Linear):
    """Like `Linear`, along half a cosine: slow at both ends."""

    def share(self, step: int) -> float:
        return (1 - math.cos(math.pi * super().share(step))) / 2


class Staircase(Schedule):
    """Staircase start + by · ⌊step / every⌋, up to ``end``.

    TCOD (2604.24005) lets the depth of multi-turn rollouts grow by one turn every 4 to 6 steps, from 1.

    Raises:
        ValueError: every < 1, or ``end`` does not lie where ``by`` leads.
    """

    def __init__(self, start: float, end: float, every: int, by: float = 1) -> None:
        if every < 1 or (end - start) * by < 0 or (by == 0 and end != start):
            raise ValueError(f"Staircase: every={every} must be >= 1, and by={by} must lead from {start} to {end}")
        self.start, self.end, self.every, self.by = start, end, every, by

    def __call__(self, step: int) -> float:
        reached = self.start + self.by * (step // self.every)
        return min(reached, self.end) if self.by > 0 else max(reached, self.end)

    def ends(self) -> list[Any]:
        return [self.start, self.end]


class Piecewise(Schedule):
    """Values from given optimizer steps on, such as ``{0: 1.0, 500: 0.0}``; any type, so also ``{student: 1.0}``.

    One value alone is a constant.

    Args:
        values: optimizer step → value; 0 must be among them.
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

    def __call__(self, step: int) -> Any:
        before = max(at for at in self.values if at <= step)
        later = [at for at in self.values if at > step]
        if not self.interpolate or not later:
            return self.values[before]
        return Linear(self.values[before], self.values[later[0]], later[0] - before)(step - before)

    def ends(self) -> list[Any]:
        return list(self.values.values())


class OnPlateau(Schedule):
    """A further value of a list whenever a metric has not improved for a number of validations.

    Args:
        monitor: a logged metric, such as ``val/accuracy``.
        values: the first one is the start.
        patience: validations without improvement before the next value. Default 3.
        min_delta: what counts as improvement. Default 0.
        mode: which way the metric is better.

    Raises:
        ValueError: no values, patience < 1, or another mode; when validated, a metric that nobody logs.
    """

    def __init__(
        self,
        monitor: str,
        values: list[Any],
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        if not values or patience < 1 or mode not in ("max", "min"):
            got = f"got {values}, {patience} and {mode}"
            raise ValueError(f"OnPlateau: values must not be empty, patience >= 1 and mode max or min; {got}")
        self.monitor, self.values, self.patience, self.min_delta, self.mode = monitor, values, patience, min_delta, mode
        self.place, self.waited, self.best = 0, 0, -math.inf

    def __call__(self, step: int) -> Any:
        return self.values[self.place]

    def ends(self) -> list[Any]:
        return self.values

    def watch(self, metrics: Mapping[str, Any]) -> None:
        if self.monitor not in metrics:
            known = ", ".join(sorted(name for name in metrics if name.startswith("val/")))
            raise ValueError(f"OnPlateau.monitor: nothing logs {self.monitor!r}; there are {known}")
        signed = float(metrics[self.monitor]) * (1 if self.mode == "max" else -1)
        if signed > self.best + self.min_delta:
            self.best, self.waited = signed, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self.place, self.waited = min(self.place + 1, len(self.values) - 1), 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "waited": self.waited, "best": {self._of_what: self.best}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at the same place of the list; the best value of another metric is none of this one."""
        self.place = min(state.get("place", 0), len(self.values) - 1)
        if self._of_what in state.get("best", {}):
            self.waited, self.best = state["waited"], state["best"][self._of_what]

    @property
    def _of_what(self) -> str:
        return f"{self.mode} {self.monitor}"


@dataclass
class Stage:
    """A part of the run with settings of its own.

    Args:
        knobs: path → value; every stage sets the same ones.
        steps: optimizer steps that it lasts; only the last stage may leave it out, and goes on to the end.
        name: for the log.
    """

    knobs: dict[str, Any]
    steps: int | None = None
    name: str = ""


class Curriculum(KnobCallback):
    """Turns knobs along schedules: the horizon, a term's coefficient (0 skips its teacher's forward pass), a policy's
    share of the rollouts, a view's strength, a divergence's β, an EMA rate, the denoising steps, …

    A knob is turned after an optimizer step and before the next rollout, and logged as ``knob/<path>``; the number of
    the stage as ``curriculum/stage``. Rollouts that are pending then (several optimizer steps per generation,
    ``rollout.max_staleness``) are trained as they are, on what the student saw when it acted. Weights of EMA teachers
    and the optimizer's moments are carried over from stage to stage. Evaluation goes by its own settings; of knobs,
    only ``student_view`` reaches it.

    Example::

        callbacks+:
          - class_path: Curriculum
            init_args:
              schedules:
                rollout.horizon: {class_path: Linear, init_args: {start: 32, end: 256, steps: 100}}

    Args:
        schedules: path of a knob → schedule.
        stages: one after the other, such as off-policy forward KL and then on-policy reverse KL.

    Raises:
        ValueError: nothing to turn, stages that do not fit together; before training, a knob that is not there, that
            refuses a value to come or that another callback turns, and a stage that needs what the run does not offer.
    """

    def __init__(self, schedules: dict[str, Schedule] | None = None, stages: list[Stage] | None = None) -> None:
        if not schedules and not stages:
            raise ValueError("Curriculum has no schedules; name a knob, such as rollout.horizon, and its schedule")
        self.stages = stages or []
        self.starts = list(accumulate((stage.steps or 0 for stage in self.stages[:-1]), initial=0))
        self.schedules = {**(schedules or {}), **self._of_stages()}
        if schedules and (twice := set(schedules) & set(self.stages[0].knobs if stages else ())):
            raise ValueError(f"Curriculum: {', '.join(sorted(twice))} is in schedules and in stages; leave one out")

    def _of_stages(self) -> dict[str, Schedule]:
        for i, stage in enumerate(self.stages):
            if stage.knobs.keys() != self.stages[0].knobs.keys() or not stage.knobs:
                raise ValueError(
                    f"Curriculum.stages[{i}] sets {sorted(stage.knobs)}, stages[0] {sorted(self.stages[0].knobs)}; "
                    "every stage must say what each of the knobs is"
                )
            last = i == len(self.stages) - 1
            if last and stage.steps is not None:
                raise ValueError(f"Curriculum.stages[{i}].steps: the last stage goes on to the end of the run")
            if not last and (stage.steps is None or stage.steps < 1):
                raise ValueError(f"Curriculum.stages[{i}].steps must be >= 1, got {stage.steps}")
        paths = self.stages[0].knobs if self.stages else ()
        at = list(zip(self.starts, self.stages, strict=True)) if self.stages else []
        return {path: Piecewise({start: stage.knobs[path] for start, stage in at}) for path in paths}

    @property
    def knobs(self) -> tuple[str, ...]:
        return tuple(self.schedules)

    def check(self, module: OnPolicyDistillation) -> None:
        """Turns the knobs to every stage and every end of a schedule once, so that what is refused is refused now."""
        super().check(module)
        needed: dict[str, str] = {}

        def rehearse() -> None:
            module.check()
            if module.rollout.max_staleness:
                refuse_teachers(module.rollout)
            needed.update(module.required_columns())

        # 1. every stage, and every end of a schedule
        for start in self.starts[: len(self.stages)]:
            self._turn_all(start)
            rehearse()
        for knob, schedule in self.schedules.items():
            self._turn_all(0)
            for value in schedule.ends() if not self.stages or knob not in self.stages[0].knobs else ():
                self.turn(knob, value)
                rehearse()
        # the run begins here; one that goes on is turned to its step by `advance`
        self._turn_all(0)
        # 2. columns of all of them
        rows = rows_of(module.trainer, "train", "the check of columns that later stages need")
        columns = getattr(rows, "column_names", None)
        for column, who in needed.items():
            if columns is not None and column not in columns:
                raise ValueError(f"a stage of the curriculum needs the column {column!r} ({who}), which the data lacks")

    def advance(self, module: OnPolicyDistillation) -> None:
        self._turn_all(module.global_step)
        if self.stages:
            number = sum(start <= module.global_step for start in self.starts)
            if module.global_step in self.starts:
                name = self.stages[number - 1].name
                rank_zero_info(f"Curriculum: stage {number} of {len(self.stages)} {name}".rstrip())

    def _turn_all(self, step: int) -> None:
        for knob, schedule in self.schedules.items():
            self.turn(knob, schedule(step))

    def on_optimizer_step_end(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        if self.stages:
            # <: this step belongs to the stage that it ends
            module.log("curriculum/stage", float(sum(start < module.global_step for start in self.starts)))
        super().on_optimizer_step_end(module, step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        for knob, schedule in self.schedules.items():
            before = schedule(trainer.global_step)
            schedule.watch(trainer.callback_metrics)
            if (now := schedule(trainer.global_step)) != before:
                rank_zero_info(f"Curriculum: {knob} goes from {before} to {now}")
        self._turn_all(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {knob: schedule.state_dict() for knob, schedule in self.schedules.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for knob, state in state_dict.items():
            self.schedules[knob].load_state_dict(state)
