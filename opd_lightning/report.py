"""Reports on runs: ``opd report runs/demo`` prints a table, draws the curves and writes a page.

Of several runs, ``opd report runs/one runs/two`` also writes a page that has them on the same axes.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from .folder import SAMPLES, VERSIONS
from .printable import cell, printable
from .report_chart import HELD_OUT, Points, is_of_teacher
from .report_page import FORMATS, HARNESS, Run, form_of, page, read_lines

Curves = dict[str, list[tuple[int, float]]]

UNMEASURED = (
    "Nothing was scored after an optimizer step: let trainer.val_check_interval divide trainer.max_steps, or run "
    "`opd validate -c {config} --ckpt_path=last` now and this report again."
)


def read_config(run: Path) -> dict[str, Any]:
    """Reads the configuration that a run was made with.

    Raises:
        FileNotFoundError: the folder holds no run of `opd fit`.
    """
    path = run / "config.yaml"
    if not path.is_file():
        why = "a run writes it when its training begins" if run.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"{run} holds no run of `opd fit` that began: there is no {path} ({why})")
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return config


def read_curves(run: Path) -> Curves:
    """Reads every logged metric as (optimizer steps done, value), over all of the run's log versions in order.

    Raises:
        FileNotFoundError: nothing was measured: the run has no metrics.csv, or none with a row.
    """
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    tables = sorted(run.glob(f"{VERSIONS}/metrics.csv"), key=lambda path: path.stat().st_mtime)
    sampled = {int(row["step"]) for row in read_lines(run / SAMPLES)}
    for table in tables:
        with table.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            step = _steps_done(row, sampled if len(rows) == 1 else set())
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    curves[name][step] = float(value)
    if not curves:
        table_is = f"{tables[-1]} is empty" if tables else f"there is no {VERSIONS}/metrics.csv"
        raise FileNotFoundError(
            f"{run}: nothing was measured: {table_is}. Either the run ended before its first step (opd fit -c "
            f"{run / 'config.yaml'} begins it again), or its logger is not CSVLogger, whose table the report reads"
        )
    return {name: sorted(points.items()) for name, points in curves.items()}


def _steps_done(row: dict[str, str], sampled: set[int]) -> int:
    """Counts the optimizer steps that were done when a row was logged.

    Rows with an epoch are Lightning's, which counts from 0. A validation apart from training that stands alone in its
    table has the number of steps, as samples of it have.
    """
    step = int(row["step"])
    is_count = not row.get("epoch") or (step in sampled and step + 1 not in sampled)
    return step if is_count else step + 1


def ends(points: Sequence[tuple[int, float]]) -> dict[str, float | None]:
    """Selects what was measured at optimizer step 0, and last after a later one; None where nothing was."""
    return {
        "before": points[0][1] if points and points[0][0] == 0 else None,
        "after": points[-1][1] if points and points[-1][0] > 0 else None,
    }


def summarize(curves: Curves) -> dict[str, float | None]:
    """Collects held-out accuracy before and after training, and of each teacher by name, as fractions or None."""
    teachers = [name for name in curves if re.fullmatch("val/[^/]+/accuracy", name) and is_of_teacher(name)]
    return ends(curves.get("val/accuracy", [])) | {name.split("/")[1]: curves[name][0][1] for name in teachers}


def measures(curves: Curves, metrics: Iterable[str]) -> dict[str, dict[str, float | None]]:
    """Collects what else validation measured, before and after training, and of each teacher, by the measure's name.

    As `ends` does. Empty where a run has neither metrics, nor several samples of a prompt, nor distances to real
    images, nor a measure of retention or of lm-evaluation-harness.

    Args:
        curves: as `read_curves` returns them.
        metrics: names of the run's ``model.evaluation.metrics``.
    """
    tries = [name.removeprefix("val/") for name in curves if re.fullmatch(r"val/pass@\d+", name)]
    harness = [name.removeprefix("val/") for name in curves if name.startswith(HARNESS)]
    distances = [name.removeprefix("val/") for name in curves if re.fullmatch(r"val/fid_\d+", name)]
    distances.sort(key=lambda name: int(name.removeprefix("fid_")))
    if not (tries or metrics or harness or distances or "val/retention/kl" in curves):
        return {}
    teachers = [name.split("/")[1] for name in curves if re.fullmatch("val/[^/]+/length", name)]
    divergences = [name.removeprefix("val/") for name in curves if re.fullmatch("val/[^/]+/kl_teacher_student", name)]
    table = {}
    for measure in (*tries, *metrics, *harness, *distances, *FORMATS, *divergences):
        if points := curves.get(f"val/{measure}"):
            table[measure] = ends(points)
            known = [name for name in teachers if f"val/{name}/{measure}" in curves]
            table[measure] |= {name: curves[f"val/{name}/{measure}"][0][1] for name in known}
    return table


def read_samples(run: Path) -> list[dict[str, Any]]:
    """Reads the student's last completions of the held-out prompts that every validation prints."""
    student_rows = [row for row in read_lines(run / SAMPLES) if row["who"] == "student"]
    return [row for row in student_rows if row["step"] == student_rows[-1]["step"]]


def new_figure(width: float, height: float) -> Any:
    """Creates an empty figure of matplotlib's, in inches.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("curves need matplotlib: pip install 'opd-lightning[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def draw(curves: Mapping[str, Points], path: Path) -> None:
    """Draws accuracy, KL to the teacher, and rollout length over optimizer steps."""
    panels: dict[str, list[str]] = {
        "held-out accuracy": [name for name in curves if re.fullmatch(HELD_OUT, name)],
        "KL at the student's states (nats)": [name for name in curves if name.startswith("train/") and "/kl_" in name],
        "rollout length": [name for name in ("train/length", "val/length") if name in curves],
    }
    panels = {title: names for title, names in panels.items() if names} or {"everything logged": [*curves][:9]}
    figure = new_figure(13, 3.6)
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            steps, values = zip(*curves[name], strict=True)
            if is_of_teacher(name):  # measured once
                axis.axhline(values[0], linestyle="--", color="gray", label=printable(name))
            else:
                axis.plot(steps, values, marker=".", label=printable(name))
        axis.set(title=title, xlabel="optimizer steps")
        for label in axis.legend(fontsize="small").get_texts():
            label.set_parse_math(False)
    figure.savefig(path, dpi=110)


def measure_table(measured: dict[str, dict[str, float | None]]) -> Table:
    """Formats what `measures` collected: a row for each measure."""
    columns = list(dict.fromkeys(name for row in measured.values() for name in row))
    table = Table(title="Other measures", title_justify="left")
    for heading in ("", *columns):
        table.add_column(cell(heading), justify="right" if heading else "left")
    for name, row in measured.items():
        form = form_of(name, row.values())
        table.add_row(cell(name), *(_written(row.get(column), form) for column in columns))
    return table


def _written(value: float | None, form: str = "{:.1%}") -> str:
    return "" if value is None else form.format(value)


def _rounded(values: dict[str, float | None]) -> dict[str, float | None]:
    return {name: value if value is None else round(value, 4) for name, value in values.items()}


def report(run: Path, since: float | None = None) -> dict[str, Any]:
    """Prints the table and the samples, draws ``curves.png``, writes ``result.json``; returns what it holds."""
    # 1. accuracy, and what else was measured
    summary = read_run(run, run.name)
    result: dict[str, Any] = _rounded(summary.scores)
    completions = read_samples(run)
    step = summary.curves["val/accuracy"][-1][0] if result["after"] is not None else None
    console = Console()
    table = Table(title=f"Accuracy on {summary.held_out}", title_justify="left")
    for name in result:
        table.add_column(cell(f"after {step} steps" if name == "after" and step else name), justify="right")
    table.add_row(*map(_written, result.values()))
    console.print(table)
    if step is None:
        console.print(cell(UNMEASURED.format(config=run / "config.yaml")))
    result["after_step"] = step
    if summary.measures:
        console.print(measure_table(summary.measures))
        result["measures"] = {name: _rounded(row) for name, row in summary.measures.items()}
    # 2. the last completions
    for row in completions:
        mark = "" if row.get("reward") is None else (" ✓" if row["reward"] >= 0.5 else " ✗")
        console.print(cell(f"  {row['prompt']}{row['completion']}{mark}"))
    # 3. files
    if since is not None:
        result["wall_s"] = round(time.time() - since, 1)
    result["seed"] = summary.config["seed_everything"]
    draw(summary.curves, run / "curves.png")
    (run / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(cell(f"{run / 'curves.png'}  {run / 'result.json'}"))
    return result


def read_run(folder: Path, label: str) -> Run:
    """Reads what a run has left in its folder, for its page."""
    config, curves = read_config(folder), read_curves(folder)
    own = config.get("model", {}).get("init_args", {}).get("evaluation") or {}
    return Run(folder, label, config, curves, summarize(curves), measures(curves, own.get("metrics") or {}))


def write_page(folders: Sequence[Path]) -> Path:
    """Writes ``report.html`` into the folder of a run, or ``comparison.html`` of several into that of the first."""
    names = [folder.resolve().name for folder in folders]
    # by their names where these differ
    labels = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    runs = [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]
    path = folders[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    path.write_text(page(runs), encoding="utf-8")
    return path


def main(arguments: Sequence[str]) -> None:
    """Prints accuracy before and after training, draws the curves of runs, and writes a page of one or of several."""
    parser = argparse.ArgumentParser(prog="opd report", description=main.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder (trainer.default_root_dir)")
    parser.add_argument("--since", type=float, help="when the run began, in seconds since 1970; adds wall_s")
    options = parser.parse_args(arguments)
    folders: list[Path] = list(dict.fromkeys(options.runs))
    for folder in folders:
        report(folder, options.since)
    print(printable(write_page(folders)))
