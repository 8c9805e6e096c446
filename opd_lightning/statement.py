"""Distillation loss statement: what was measured of a student before and after training, and what was not.

After KD Must Account for What It Loses (2604.25110): an equal score of the task says nothing of what else became of a
model, and what nobody measured is not preserved. Beside the run's own measures stand the areas that the paper names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .report import Curves, measures, read_curves, summarize
from .report_page import HARNESS, form_of

TASK, OTHERS, KNOWN = "the task, held-out prompts", "prompts of another kind", "known benchmarks"
AREAS = (
    "uncertainty",
    "boundary behavior",
    "process",
    "on-policy stability",
    "grounding",
    "privacy",
    "safety",
    "diversity",
)
"""Areas of 2604.25110, none of which a run here measures."""
NOT_MEASURED = "not measured"
PLAIN = re.compile(r"[\w.@-]{1,60}(/[\w.@-]{1,60}){0,3}")
"""Names of metrics that may be published: a configuration may hold anything in their place."""


@dataclass(frozen=True)
class Measure:
    """Measure of one capability.

    Attributes:
        capability: what it tells of.
        name: as it is logged, without ``val/``.
        values: ``before``, ``after``, and of each teacher by name; those that are missing were not measured.
    """

    capability: str
    name: str
    values: dict[str, float]


@dataclass(frozen=True)
class Statement:
    """Statement of a student.

    Attributes:
        steps: optimizer steps of the student.
        last: step after which it was measured last; 0: after none.
        measures: all there are.
    """

    steps: int
    last: int
    measures: Sequence[Measure]

    def markdown(self) -> str:
        """Writes the statement as a section of a model card."""
        # 1. a row for each measure, and for each capability without one
        teachers = list(
            dict.fromkeys(who for one in self.measures for who in one.values if who not in ("before", "after"))
        )
        columns = ["before", "after", *teachers]
        rows = []
        for capability in (TASK, OTHERS, KNOWN, *AREAS):
            own = [one for one in self.measures if one.capability == capability]
            rows += [_row(one, columns) for one in own]
            rows += [] if own else [[capability, NOT_MEASURED, *("" for _ in columns)]]
        # 2. when, and what the table does not say
        head = ["capability", "measure", *columns]
        table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
        when = (
            f"Measured after optimizer step {self.last} of {self.steps}."
            if self.last
            else "Nothing was measured after training."
        )
        return (
            "## Distillation loss statement\n\n"
            "What training changed besides what it was for, as far as the run measured it (after 2604.25110). What is "
            f"not measured may be lost. {when}\n\n{table}\n"
        )

    def results(self, task: str) -> list[EvalResult]:
        """Lists what was measured after training in the form of the hub; ``task``: its word for what the model does."""
        return [
            EvalResult(
                task_type=task,
                dataset_type=_data(one).replace(" ", "-"),
                dataset_name=_data(one),
                metric_type=one.name.rpartition("/")[2],
                metric_name=one.name,
                metric_value=round(one.values["after"], 4),
            )
            for one in self.measures
            if "after" in one.values
        ]


def statement_of(run: Path | None, steps: int, metrics: Sequence[str]) -> Statement:
    """Collects what a run measured of its student.

    Args:
        run: its folder; None: not known.
        steps: optimizer steps of the student; what was measured later is of another one.
        metrics: names of the run's ``model.evaluation.metrics``.
    """
    # 1. the log, up to the student's step
    try:
        curves = read_curves(run) if run is not None else {}
    except FileNotFoundError:  # another logger's
        curves = {}
    points = {name: [point for point in own if point[0] <= steps] for name, own in curves.items()}
    points = {name: own for name, own in points.items() if own}
    # 2. what is known by its names
    scores = {"accuracy": summarize(points), **measures(points, [name for name in metrics if PLAIN.fullmatch(name)])}
    candidates = [
        Measure(
            _capability(name),
            name,
            {who: value for who, value in values.items() if value is not None and PLAIN.fullmatch(who)},
        )
        for name, values in scores.items()
        if PLAIN.fullmatch(name)
    ]
    return Statement(steps, _last(points, steps), [one for one in candidates if one.values])


def _last(curves: Curves, steps: int) -> int:
    """Finds the optimizer step after which something was measured last."""
    ends = [own[-1][0] for name, own in curves.items() if name.startswith("val/")]
    return min(steps, max(ends, default=0))


def _capability(name: str) -> str:
    if f"val/{name}".startswith(HARNESS):
        return KNOWN
    return OTHERS if name.startswith("retention/") else TASK


def _data(measure: Measure) -> str:
    """Names the data of a measure: a task of the harness, or the run's own."""
    return measure.name.split("/")[1] if measure.capability == KNOWN else measure.capability.removeprefix("the task, ")


def _row(measure: Measure, columns: Sequence[str]) -> list[str]:
    form = form_of(measure.name, measure.values.values())
    cells = [form.format(measure.values[who]) if who in measure.values else NOT_MEASURED for who in columns]
    return [measure.capability, measure.name, *cells]


def folder_of(checkpoint: str | Path) -> Path | None:
    """Finds the folder of the run that a checkpoint, or the run's folder itself, belongs to; None: there is none."""
    path = Path(checkpoint).resolve()
    candidates = [path, path.parent, path.parent.parent]
    return next((folder for folder in candidates if (folder / "config.yaml").is_file()), None)


def metrics_of(config: dict[str, Any]) -> list[str]:
    """Lists the names of a configuration's ``model.evaluation.metrics``."""
    return list(((config["model"]["init_args"].get("evaluation") or {}).get("metrics")) or {})
