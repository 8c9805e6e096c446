"""Reports on few-step runs: ``opd table runs/demo-diffusion`` prints Frechet distances by number of steps.

It also draws ``table.png`` and ``grid.png`` and writes ``table.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from ...picture import Picture
from ...printable import cell
from ...report import Curves, new_figure, read_config, read_curves


def by_steps(curves: Curves, prefix: str, place: int, metric: str = "fid") -> dict[int, float]:
    """Collects the first (0) or last (−1) value of a metric by number of steps."""
    pattern = re.compile(rf"{re.escape(prefix)}/{metric}_(\d+)")
    values = {int(m[1]): points[place][1] for name, points in curves.items() if (m := pattern.fullmatch(name))}
    return dict(sorted(values.items()))


def closed(before: float, after: float, aim: float) -> float:
    """Computes the share of the gap between ``before`` and ``aim`` that ``after`` closed."""
    return (before - after) / (before - aim)


def report(run: Path, steps: int = 4, since: float | None = None) -> dict[str, Any]:
    """Prints the table, draws the pictures, writes ``table.json``; returns what it holds.

    Raises:
        ValueError: the run sampled no frozen teacher (``evaluation.before``).
    """
    # 1. the table
    config, curves = read_config(run), read_curves(run)
    teacher = by_steps(curves, "val/teacher", 0)
    if not teacher:
        raise ValueError(f"{run}: nothing was measured of a frozen teacher; set model.evaluation.before")
    rows = {
        "teacher": teacher,
        "student before": by_steps(curves, "val", 0),
        "student after": by_steps(curves, "val", -1),
    }
    table = Table(title="Frechet distance to real images, by number of steps", title_justify="left")
    table.add_column("")
    for count in teacher:
        table.add_column(str(count), justify="right")
    for name, values in rows.items():
        table.add_row(name, *(f"{values[count]:.2f}" for count in teacher))
    console = Console()
    console.print(table)
    # 2. the numbers of ``table.json``
    most, after = max(teacher), rows["student after"]
    result: dict[str, Any] = {
        "before": round(teacher[steps], 4),
        "after": round(after[steps], 4),
        "teacher": round(teacher[most], 4),
        "gap_closed": round(closed(teacher[steps], after[steps], teacher[most]), 4),
        "steps": {name: {str(k): round(v, 4) for k, v in values.items()} for name, values in rows.items()},
    }
    console.print(f"with {steps} steps, {result['gap_closed']:.0%} of the gap to the teacher's {most} steps is closed")
    if since is not None:
        result["wall_s"] = round(time.time() - since, 1)
    result["seed"] = config["seed_everything"]
    # 3. files
    draw(curves, run / "table.png")
    grid(run, steps, most, run / "grid.png")
    (run / "table.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(cell(f"{run / 'table.png'}  {run / 'grid.png'}  {run / 'table.json'}"))
    return result


def draw(curves: Curves, path: Path) -> None:
    """Draws distances over optimizer steps, one curve for each number of denoising steps."""
    figure = new_figure(5, 3.6)
    axis: Any = figure.subplots()
    for count in by_steps(curves, "val", 0):
        axis.plot(*zip(*curves[f"val/fid_{count}"], strict=True), marker=".", label=f"{count} steps")
    aim = by_steps(curves, "val/teacher", 0)
    axis.axhline(aim[max(aim)], linestyle="--", color="gray", label=f"teacher, {max(aim)} steps")
    axis.set(title="Frechet distance", xlabel="optimizer steps", yscale="log")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def grid(run: Path, steps: int, most: int, path: Path) -> None:
    """Draws the teacher's and the student's samples of the same noise, under each other."""
    last = max(int(m[1]) for file in (run / "grids").glob("student_*") if (m := re.search(r"step-(\d+)_", file.name)))
    files = {
        f"teacher, {steps} steps": f"teacher_step-0_steps-{steps}.png",
        f"teacher, {most} steps": f"teacher_step-0_steps-{most}.png",
        f"student, {steps} steps": f"student_step-{last}_steps-{steps}.png",
    }
    sheets = {title: Image.open(run / "grids" / name) for title, name in files.items()}
    width, height = (max(sheet.size[side] for sheet in sheets.values()) for side in (0, 1))
    picture = Image.new("RGB", (width, len(sheets) * (height + 16)), "white")
    for row, (title, sheet) in enumerate(sheets.items()):
        ImageDraw.Draw(picture).text((2, row * (height + 16) + 2), title, fill="black")
        picture.paste(sheet, (0, row * (height + 16) + 16))
    picture.save(path)


def pictures(run: Path) -> list[list[Picture]]:
    """Collects the sheets of samples that validations drew: the teacher's, and the student's first and last ones.

    Raises:
        FileNotFoundError: the run has none.
    """
    sheets: dict[str, dict[tuple[int, int], Path]] = {}
    for file in (run / "grids").glob("*.png"):
        if match := re.fullmatch(r"(.+)_step-(\d+)_steps-(\d+)", file.stem):
            sheets.setdefault(match[1], {})[int(match[3]), int(match[2])] = file
    if not sheets:
        raise FileNotFoundError(f"{run / 'grids'} holds no sheets of samples")
    drawn = []
    for count in sorted({count for known in sheets.values() for count, _ in known}):
        line = []
        for who, known in sorted(sheets.items(), key=lambda item: item[0] == "student"):
            updates = sorted(step for number, step in known if number == count)
            for step in dict.fromkeys((*updates[:1], *updates[-1:])):
                when = f", after {step} optimizer steps" if step else ", before training"
                when, plural = when if who == "student" else "", "" if count == 1 else "s"
                with Image.open(known[count, step]) as sheet:
                    line.append(Picture(f"{who}, {count} denoising step{plural}{when}", sheet.convert("RGB")))
        drawn.append(line)
    return drawn


def main(arguments: Sequence[str]) -> None:
    """Prints Frechet distances by number of denoising steps, and draws the curves of a run."""
    parser = argparse.ArgumentParser(prog="opd table", description=main.__doc__)
    parser.add_argument("run", type=Path, help="the run's folder (trainer.default_root_dir)")
    parser.add_argument("--steps", type=int, default=4, help="the student's number of steps")
    parser.add_argument("--since", type=float, help="when the run began, in seconds since 1970; adds wall_s")
    options = parser.parse_args(arguments)
    report(options.run, options.steps, options.since)
