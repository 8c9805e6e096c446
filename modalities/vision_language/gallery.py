"""Gallery of a run: the student's answers before and after, beside the images that it and its teacher saw.

``opd gallery runs/demo-vlm`` draws ``gallery.png``.

The held-out examples are the first ones, as `Evaluation.show` has them written to samples.jsonl. Where answers are
places on the screen (GUI grounding), they are drawn: the target as a rectangle, the student's clicks as crosses.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser

from ...module import OnPolicyDistillation
from ...picture import Picture, from_data_uri
from ...printable import printable
from ...report import new_figure, read_config
from .images import images_of

EPISODES = 4
BEFORE, AFTER, TARGET = "tab:red", "tab:green", "tab:blue"


def read(run: Path) -> tuple[OnPolicyDistillation, Any, list[dict[str, Any]], list[dict[str, Any]]]:
    """Reads a run: its module (no model is loaded), held-out rows, and samples before and after training.

    Raises:
        FileNotFoundError: the folder holds no run of `opd fit`.
    """
    config = read_config(run)
    parser = ArgumentParser()
    parser.add_subclass_arguments(OnPolicyDistillation, "model")
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    parts = parser.instantiate_classes(parser.parse_object({"model": config["model"], "data": config["data"]}))
    parts.data.setup("validate")
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    student_rows = [row for row in samples if row["who"] == "student"]
    first, last = student_rows[0]["step"], student_rows[-1]["step"]
    return (
        parts.model,
        parts.data.validation,
        [row for row in student_rows if row["step"] == first],
        [row for row in student_rows if row["step"] == last],
    )


def gallery(run: Path, across: int = 4) -> Path:
    """Draws ``gallery.png`` into the run's folder, ``across`` examples in a row."""
    # 1. what there is to be drawn
    module, rows, before, after = read(run)
    if any("turns" in row for row in after):
        return _episodes(run / "gallery.png", rows, before, after)
    views: list[tuple[str, Callable[[Any], Any]]] = [("student sees", lambda example: module.shown([example])[0])]
    views += [(f"{name} sees", teacher.look) for name, teacher in module.teachers.items() if teacher.view is not None]
    count, width = len(after), len(views)
    lines = -(-count // across)
    figure = new_figure(1.9 * across * width, 2.9 * lines)
    axes: Any = figure.subplots(lines, across * width, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    # 2. an example after the other
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        example = dict(rows[i])
        for k, (title, look) in enumerate(views):
            axis = axes[i // across, (i % across) * width + k]
            view_example = look(example)
            if view_example is None:
                continue
            images = images_of(view_example)
            axis.imshow(images[0], interpolation="nearest")
            if k == 0:
                prompt = "\n".join(textwrap.wrap(printable(new["prompt"]), 26))
                axis.set_title(prompt, fontsize=8, loc="left", parse_math=False)
                answers = printable(_answers(example, old, new))
                axis.text(0, -0.04, answers, fontsize=8, va="top", transform=axis.transAxes, parse_math=False)
                if "prediction" in new:
                    _places(axis, old, new, images[0].width / images_of(example)[0].width)
            else:
                axis.set_title(printable(title), fontsize=8, loc="left", color="gray", parse_math=False)
    path = run / "gallery.png"
    figure.savefig(path, dpi=100)
    return path


def _episodes(path: Path, rows: Any, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Path:
    """Draws the first `EPISODES` before and after training, a line each: all screens, and what was answered to each."""
    lines = [
        (title, rows[i], samples[i])
        for i in range(min(len(after), EPISODES))
        for title, samples in (("before", before), ("after", after))
    ]
    across = max(len(sample["turns"]) for _, _, sample in lines)
    figure = new_figure(2.6 * across, 2.9 * len(lines))
    axes: Any = figure.subplots(len(lines), across, squeeze=False)
    for line, (title, row, sample) in enumerate(lines):
        screens = [images_of(dict(row))[0], *map(from_data_uri, sample.get("observed", ()))]
        clicks = sample.get("clicks", [None] * len(sample["turns"]))
        for turn, axis in enumerate(axes[line]):
            axis.axis("off")
            if turn >= len(sample["turns"]):
                continue
            # an error is answered without a screenshot
            screen = screens[min(turn, len(screens) - 1)]
            axis.imshow(screen, interpolation="nearest")
            if clicks[turn] is not None:
                place = (share * length for share, length in zip(clicks[turn], screen.size, strict=True))
                axis.plot(*([value] for value in place), marker="x", markersize=9, markeredgewidth=2.5, color=BEFORE)
            words = [*textwrap.wrap(printable(sample["prompt"]), 34), f"{title}: reward {sample.get('reward')}"]
            if turn == 0:
                axis.set_title("\n".join(words), fontsize=8, loc="left", parse_math=False)
            text = printable(sample["turns"][turn])
            axis.text(0, -0.04, text[:40], fontsize=8, va="top", transform=axis.transAxes, parse_math=False)
    figure.savefig(path, dpi=100)
    return path


def pictures(run: Path) -> list[list[Picture]]:
    """Draws what student and teachers saw of the held-out examples, with answers and clicks, a list for each example.

    Raises:
        FileNotFoundError: the folder holds no run of `opd fit`.
    """
    module, rows, before, after = read(run)
    drawn = []
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        example = dict(rows[i])
        image = images_of(module.shown([example])[0])[0]
        places: dict[str, Any] = {}
        if "prediction" in new:
            scale = image.width / images_of(example)[0].width
            places["target"] = tuple(scale * value for value in new["box"])
            for name, row in (("before", old), ("after", new)):
                if row["prediction"] is not None:
                    places[name] = _center([scale * value for value in row["prediction"]])
        words = [new["prompt"], *_answers(example, old, new).split("\n")]
        line = [Picture("student sees", image, words=words, **places)]
        for name, teacher in module.teachers.items():
            view_example = teacher.look(example) if teacher.view is not None else None
            if view_example is not None:
                line.append(Picture(f"{name} sees", images_of(view_example)[0]))
        for number, screen in enumerate(new.get("observed", ()), 2):
            line.append(Picture(f"screen {number}, after training", from_data_uri(screen)))
        drawn.append(line)
    return drawn


def _center(place: Sequence[float]) -> tuple[float, float]:
    """Returns the center of a box, or a point as it is."""
    return (place[0] + place[-2]) / 2, (place[1] + place[-1]) / 2


def _answers(example: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> str:
    rewards = [row.get("reward") for row in (old, new)]
    signs = ["" if reward is None else " ✓" if reward >= 0.5 else " ✗" for reward in rewards]
    marked = [f"{row['completion']}{sign}" for row, sign in zip((old, new), signs, strict=True)]
    answer = f"\nanswer: {example['answer']}" if "answer" in example else ""
    return f"before: {marked[0]}\nafter: {marked[1]}{answer}"


def _places(axis: Any, old: dict[str, Any], new: dict[str, Any], scale: float) -> None:
    x1, y1, x2, y2 = (scale * value for value in new["box"])
    axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=TARGET, linewidth=1.5)
    for row, color in ((old, BEFORE), (new, AFTER)):
        if row["prediction"] is not None:
            x, y = _center([scale * value for value in row["prediction"]])
            axis.plot([x], [y], marker="x", markersize=9, markeredgewidth=2.5, color=color)


def main(arguments: Sequence[str]) -> None:
    """Draws what a student that sees answered before and after training, beside what it and its teacher saw."""
    parser = argparse.ArgumentParser(prog="opd gallery", description=main.__doc__)
    parser.add_argument("run", type=Path, help="the run's folder (trainer.default_root_dir)")
    print(printable(gallery(parser.parse_args(arguments).run)))
