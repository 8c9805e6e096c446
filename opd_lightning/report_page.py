"""Page of a report: what a run or several have left in their folders, as one HTML file that needs no network.

What models and rows say is escaped: by the template, as text; and by a policy in its head, under which no script but
its own runs and nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

from .folder import ALARMS, SAMPLES
from .picture import Picture
from .printable import printable
from .report_chart import Points, charts, short, svg

MOST_SAMPLES, MOST_STEPS = 500, 2000
"""Samples of a page, and steps of each that are colored."""
SHADES, UNLIKELY = 8, 6.0
"""Shades of a step, and the nats at which it has the darkest."""
RETAINED = (
    ("retention/accuracy", "accuracy", "{:.1%}"),
    ("retention/perplexity", "perplexity", "{:.2f}"),
    ("retention/kl", "KL to the model that is to be kept", "{:.3f} nats"),
)
"""Measures of retention: name, words, format."""
HARNESS = "val/lm_eval/"
"""Beginning of metrics of lm-evaluation-harness, which need not be shares."""
# what is reported besides accuracy and metrics of the run's own, which are shares
FORMATS = {"length": "{:.1f}"} | {name: form.split()[0] for name, _, form in RETAINED}


@dataclass(frozen=True)
class Run:
    """Run as its report tells of it.

    Attributes:
        folder: its folder.
        label: its name on the page.
        config: of the run.
        curves: as `read_curves` returns them.
        scores: held-out accuracy ``before``, ``after``, and of each teacher by name; None where not measured.
        measures: the same of what else validation measured, by name.
    """

    folder: Path
    label: str
    config: dict[str, Any]
    curves: Mapping[str, Points]
    scores: dict[str, float | None]
    measures: dict[str, dict[str, float | None]]

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Content of ``run.json``; empty of a run before there was one."""
        path = self.folder / "run.json"
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return told

    @cached_property
    def alarms(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / ALARMS)

    @property
    def is_scored(self) -> bool:
        """Tells whether accuracy was measured at all."""
        return any(value is not None for value in self.scores.values())

    @property
    def is_watched(self) -> bool:
        return "train/alarms" in self.curves

    @property
    def is_shipped(self) -> bool:
        """Tells whether shipped files are among those that it was made of."""
        return any(name.startswith("opd:") for name in self.provenance.get("files", ()))

    @cached_property
    def held_out(self) -> str:
        """Words for the held-out prompts: with their number where they are so few that samples were shown of all."""
        model, data = ((self.config.get(part) or {}).get("init_args") or {} for part in ("model", "data"))
        # of the first batch, and of the first rank
        most = min((model.get("evaluation") or {}).get("show", 3), data.get("validation_batch_size", math.inf))
        rows = [
            row for row in read_lines(self.folder / SAMPLES) if (row["who"], row.get("stage")) == ("student", "val")
        ]
        # a validation may have been repeated
        count = min(Counter(row["step"] for row in rows).values(), default=most)
        is_alone = self.provenance.get("hardware", {}).get("devices of the run") == "1"
        number = f"{count} " if is_alone and count < most else ""
        return f"{number}held-out prompt{'' if number == '1 ' else 's'}"

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Held-out prompts with what the student wrote before and after training, and each teacher before it."""
        rows = read_lines(self.folder / SAMPLES)
        student = [row for row in rows if row["who"] == "student"]
        if not student:
            return []
        first, last = student[0]["step"], student[-1]["step"]
        columns = {"before": [row for row in student if row["step"] == first]} if first == 0 else {}
        if last > 0:
            columns["after"] = [row for row in student if row["step"] == last]
        for row in rows:
            if row["who"] != "student" and row["step"] == 0:
                columns.setdefault(row["who"], []).append(row)
        pairs: dict[tuple[str, int], dict[str, Any]] = {}
        for who, column in columns.items():
            for key, row in numbered(column):
                pairs.setdefault(key, {})[who] = row
        # of images and the like there is no text
        texts = [(prompt, by) for (prompt, _), by in pairs.items() if any(row["completion"] for row in by.values())]
        return [{"prompt": prompt, "by": by} for prompt, by in texts[:MOST_SAMPLES]]

    @property
    def is_colored(self) -> bool:
        """Tells whether what a teacher made of samples was written down."""
        return any("steps" in row for sample in self.samples for row in sample["by"].values())

    @cached_property
    def rollouts(self) -> dict[int, list[dict[str, Any]]]:
        """Rollouts that `Samples` wrote down, by optimizer step, the first and the last ones where they are many."""
        by_step: dict[int, list[dict[str, Any]]] = {}
        for row in read_lines(self.folder / "rollouts.jsonl"):
            by_step.setdefault(row["step"], []).append(row)
        kept = dict(sorted(by_step.items()))
        while sum(map(len, kept.values())) > MOST_SAMPLES and len(kept) > 2:
            del kept[sorted(kept)[len(kept) // 2]]
        return kept

    @cached_property
    def categories(self) -> list[tuple[str, list[float | None]]]:
        """Last accuracy of each value of the columns in ``evaluation.by``, of validation and of a test."""
        table: dict[str, list[float | None]] = {}
        for place, stage in enumerate(("val", "test")):
            for name, points in self.curves.items():
                if match := re.fullmatch(rf"{stage}/accuracy/(.+)", name):
                    table.setdefault(match[1], [None, None])[place] = points[-1][1]
        return sorted(table.items())

    @property
    def stages(self) -> list[tuple[int, str]]:
        """Lists the places in `categories` that have values, with their names."""
        names = enumerate(("validation", "test"))
        return [(at, name) for at, name in names if any(values[at] is not None for _, values in self.categories)]

    def pictures(self) -> tuple[list[list[Picture]], str]:
        """Asks the run's setting for pictures, a list for each row of the page, and why there are none."""
        path = str((self.config.get("model") or {}).get("class_path") or "")
        module, _, name = path.rpartition(".")
        try:
            return (getattr(import_module(module), name).pictures(self.folder), "") if module else ([], "")
        except Exception as error:  # rows, pages or classes that were there when it ran: the rest is worth reading
            return [], f"{type(error).__name__}: {error}"


def form_of(measure: str, values: Iterable[float | None]) -> str:
    """Returns the format of a measure's values, by its name without ``val/``: most are shares, unless one can't be."""
    plain = measure.endswith("/kl_teacher_student") or f"val/{measure}".startswith((HARNESS, "val/fid_"))
    is_share = all(value is None or 0 <= value <= 1 for value in values)
    return "{:.3f}" if plain else FORMATS.get(measure, "{:.1%}" if is_share else "{:.2f}")


def side_by_side(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Lists samples for the page: of several runs all that was written to a prompt stands beside each other."""
    if len(runs) == 1:
        return runs[0].samples
    prompts: dict[tuple[str, int], dict[str, Any]] = {}
    for who in dict.fromkeys(who for run in runs for sample in run.samples for who in sample["by"]):
        for run in runs:
            for key, sample in numbered(run.samples):
                if who in sample["by"]:
                    prompts.setdefault(key, {})[f"{run.label}, {who}"] = sample["by"][who]
    return [{"prompt": prompt, "by": by} for (prompt, _), by in prompts.items()]


def numbered(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """Yields rows by prompt and by how often it came before: the same question may be asked about many images."""
    counts: Counter[str] = Counter()
    for row in rows:
        yield (row["prompt"], counts[row["prompt"]]), row
        counts[row["prompt"]] += 1


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines; one that was cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def verdict(run: Run) -> str:
    """Says in a few sentences whether training helped, and what it cost on prompts of another kind."""
    return " ".join(filter(None, (_gain(run), _retention(run))))


def _retention(run: Run) -> str:
    """Says what became of the measures of retention; empty where none was measured after an optimizer step."""
    parts = []
    for name, what, form in RETAINED:
        before, after = (run.measures.get(name, {}).get(column) for column in ("before", "after"))
        if after is not None:
            start = "" if before is None else f"from {form.format(before)} "
            parts.append(f"{what} went {start}to {form.format(after)}")
    return f"On prompts of another kind {', '.join(parts)}." if parts else ""


def _gain(run: Run) -> str:
    before, after = run.scores["before"], run.scores["after"]
    teachers = {name: value for name, value in run.scores.items() if name not in ("before", "after")}
    if after is None:
        return _verdict_of_another_metric(run)
    points = run.curves["val/accuracy"]
    sentence = f"After {int(points[-1][0])} optimizer steps the student solves {after:.1%} of the {run.held_out}"
    if before is not None:
        change = "no change" if round(after - before, 3) == 0 else f"{after - before:+.1%}".replace("%", " points")
        sentence += f", before training it was {before:.1%} ({change})"
    for name, value in teachers.items():
        if value is None:
            continue
        sentence += f"; {name} has {value:.1%}"
        if before is not None and before < min(after, value):
            sentence += f", {(after - before) / (value - before):.0%} of the gap is closed"
    step, best = max(points, key=lambda point: point[1])
    if best - after > 0.02:
        sentence += f". It was better after step {int(step)}: {best:.1%}"
    return f"{sentence}."


def _verdict_of_another_metric(run: Run) -> str:
    for name in sorted(name for name in run.curves if re.fullmatch(r"val/(fid_\d+|length)", name)):
        points = run.curves[name]
        if len(points) > 1:
            return (
                f"No accuracy was measured; {name.removeprefix('val/')} went from {short(points[0][1])} to "
                f"{short(points[-1][1])} in {int(points[-1][0])} optimizer steps."
            )
    return "Nothing was scored after an optimizer step, so nobody knows whether training helped."


def colored(row: dict[str, Any]) -> Markup:
    """Colors the steps of a rollout by how unlikely the teacher found each, or by the signal where that is unknown.

    The teacher's likeliest steps are in the attribute ``data-l``, for the pointer.
    """
    steps, signals = row.get("steps"), row.get("signals") or []
    if not steps:
        return escape(printable(row["completion"]))
    log_probs, likeliest = row.get("teacher_log_probs"), row.get("likeliest")
    pieces = []
    for i, text in enumerate(steps[:MOST_STEPS]):
        log_prob = log_probs[i] if log_probs else None
        value = (
            -log_prob if log_prob is not None else abs(signals[i] or 0.0) if i < len(signals) and not log_probs else 0.0
        )
        shade = min(SHADES - 1, round((SHADES - 1) * value / UNLIKELY))
        lines = [] if log_prob is None else [["", log_prob]]
        lines += (likeliest[i] or []) if likeliest else []
        data = f' data-l="{escape(json.dumps(_shown(lines)))}"' if lines else ""
        pieces.append(f"<i class=s{shade}{data}>{escape(printable(text))}</i>")
    rest = "" if len(steps) <= MOST_STEPS else f" … {len(steps) - MOST_STEPS} more"
    return Markup("".join(pieces) + rest)


def _shown(lines: list[list[Any]]) -> list[list[Any]]:
    return [[printable(text), _share(value)] for text, value in lines if value is not None]


def _share(log_prob: float) -> str:
    return f"{math.exp(log_prob):.1%}"


def page(runs: Sequence[Run]) -> str:
    """Writes the page of one run, or of several on the same axes."""
    source = files("opd_lightning")
    script = (source / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
    )
    main, rest = charts({run.label: run.curves for run in runs})
    return environment.from_string((source / "report.jinja").read_text(encoding="utf-8")).render(
        runs=runs,
        verdict=verdict,
        main=main,
        rest=rest,
        svg=svg,
        short=short,
        form_of=form_of,
        colored=colored,
        samples=side_by_side(runs),
        shares=[_share(-UNLIKELY * k / (SHADES - 1)) for k in range(SHADES)],
        style=Markup((source / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
    )
