"""Charts of a run's metrics as SVG: which columns belong together, thinned curves, axes."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from .printable import printable

Points = Sequence[tuple[float, float]]
MOST = 500
"""Points of a curve that are drawn."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 240, 52, 10, 8, 34
COLORS, DASHES = 8, 4
READABLE = 8
"""Curves of a chart that are told apart at a glance."""

HELD_OUT = r"val/((?!retention/)[^/]+/)?(accuracy|pass@\d+)"
"""Held-out accuracy, of the student and of teachers."""

GROUPS: tuple[tuple[str, str, str], ...] = (
    ("held-out accuracy", HELD_OUT, "share"),
    ("distance to real images (Frechet)", r"val/([^/]+/)?fid_\d+", "log"),
    ("KL at the student's states (nats)", r"(train|val)/.*kl_(student_teacher|teacher_student)", "log"),
    ("KL at the first step (nats)", r"(train|val)/.*kl_first_step", "log"),
    ("entropy (nats)", r"(train|val)/(.*/|student_)?entropy", ""),
    ("length of rollouts", r"(train|val)/([^/]+/)?length", ""),
    ("share of rollouts that stop by themselves", r"(train|val)/([^/]+/)?stopped", "share"),
    ("throughput (steps per second)", r"speed/.*", ""),
    ("share of the time", r"time/.*_share", "share"),
    ("model FLOP utilization, and padding", r"work/.*", "share"),
    ("reward in training", r"train/reward", ""),
    ("loss", r"train/loss/.*", ""),
    ("gradient norm", r"train/gradient_norm", "log"),
    ("accuracy on prompts of another kind", r"val/retention/accuracy", "share"),
    ("KL to the model that is to be kept (nats)", r"val/retention/kl", "log"),
    ("perplexity on prompts of another kind", r"val/retention/perplexity", ""),
    ("alarms", r"train/(alarms|repetition)", "share"),
)
"""Titles of charts, the columns of each, and the axis of y (`Chart`)."""


@dataclass(frozen=True)
class Series:
    """Curve of a chart.

    Attributes:
        label: in the legend.
        points: ``(x, y)`` in the order of x.
        color, dash: numbers of styles.
        is_once: whether it was measured once of something that training leaves alone, and is drawn as a line across.
    """

    label: str
    points: Points
    color: int
    dash: int = 0
    is_once: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves on common axes.

    Attributes:
        title: above it.
        series: its curves.
        along: what x is.
        axis: "share" from 0 to 1; "log", where values span more than a factor of 50; else as wide as the values.
    """

    title: str
    series: list[Series]
    along: str = "optimizer steps"
    axis: str = ""


def thinned(points: Points, most: int = MOST) -> Points:
    """Selects at most ``most`` points: the ends, and the lowest and highest of each of equally long pieces."""
    if len(points) <= most:
        return points
    inner, pieces = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for i in range(pieces):
        piece = inner[i * len(inner) // pieces : (i + 1) * len(inner) // pieces]
        extremes = {min(piece, key=lambda point: point[1]), max(piece, key=lambda point: point[1])}
        kept += sorted(extremes)
    return [*kept, points[-1]]


def charts(curves: Mapping[str, Mapping[str, Points]]) -> tuple[list[Chart], list[Chart]]:
    """Groups the metrics of runs into charts.

    Args:
        curves: points by metric, by name of the run.

    Returns:
        The charts of `GROUPS` that show something. Those that have no curve, and those behind the first that have more
        than `READABLE`, or one value alone, come second, with one for each metric that is in none of them.
    """
    names = list(dict.fromkeys(name for run in curves.values() for name in run))
    main, grouped = [], set()
    for title, pattern, axis in GROUPS:
        columns = [name for name in names if re.fullmatch(pattern, name)]
        grouped.update(columns)
        if columns:
            main.append(Chart(title, _series(curves, columns), axis=axis))
        if title == GROUPS[0][0] and columns and (chart := _per_generated(curves, columns)):
            main.append(chart)
    dull = [chart for chart in main if all(len(one.points) == 1 for one in chart.series)]
    dull += [chart for chart in main[1:] if len(chart.series) > READABLE or _is_constant(chart)]
    rest = [Chart(name, _series(curves, [name])) for name in sorted(set(names) - grouped)]
    return [chart for chart in main if chart not in dull], [*dull, *rest]


def _is_constant(chart: Chart) -> bool:
    return len({y for one in chart.series for _, y in one.points}) == 1


def is_of_teacher(name: str) -> bool:
    """Tells whether a metric is a teacher's own, which training leaves alone: a KL to it is none."""
    return re.fullmatch(r"val/(?!(retention|lm_eval|accuracy)/)[^/]+/(?!kl_).+", name) is not None


def _series(curves: Mapping[str, Mapping[str, Points]], columns: list[str]) -> list[Series]:
    """Colors a single run's curves by metric, and several runs' by run, with a dash for each metric."""
    several = len(curves) > 1
    return [
        Series(
            f"{label}: {name}" if several else name,
            run[name],
            (i if several else k) % COLORS,
            k % DASHES if several else 0,
            len(run[name]) == 1 and is_of_teacher(name),
        )
        for i, (label, run) in enumerate(curves.items())
        for k, name in enumerate(columns)
        if name in run
    ]


def _per_generated(curves: Mapping[str, Mapping[str, Points]], columns: list[str]) -> Chart | None:
    """Draws the same curves over what was generated and trained until then (tokens, of settings that write)."""
    moved, units = {}, set()
    for label, run in curves.items():
        so_far = [name for name in run if re.fullmatch(r"train/\w+_so_far", name)]
        if so_far:
            units.add(so_far[0].removeprefix("train/").removesuffix("_so_far"))
            counts = thinned(run[so_far[0]])
            moved[label] = {
                name: [(interpolated(counts, x), y) for x, y in thinned(run[name])]
                for name in columns
                if name in run and (len(run[name]) > 1 or run[name][0][0] == 0)
            }
    if not moved:
        return None
    unit = " or ".join(sorted(units))
    series = _series(moved, [name for name in columns if any(name in run for run in moved.values())])
    return Chart(f"{GROUPS[0][0]} by {unit} generated", series, f"{unit} generated and trained so far", GROUPS[0][2])


def interpolated(points: Points, x: float) -> float:
    """Reads a curve that begins at (0, 0) at ``x``, linearly between its points, and flat after the last."""
    known = [(0.0, 0.0), *((float(a), b) for a, b in points if a > 0)]
    k = bisect_right([a for a, _ in known], x)
    if k == len(known):
        return known[-1][1]
    (x0, y0), (x1, y1) = known[k - 1], known[k]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Chooses about ``count`` round numbers within a range."""
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if raw <= size * factor * 1.0001)
    first = math.ceil(low / step - 1e-9)
    values = [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]
    return [0.0 if abs(value) < step / 1e6 else value for value in values]


def short(value: float) -> str:
    """Formats a number for an axis or a table: 12k, 0.25, 1e-05."""
    if abs(value) >= 1e4:
        return f"{value / 1e6:.4g}M" if abs(value) >= 1e6 else f"{value / 1e3:.4g}k"
    return f"{value:.4g}"


def svg(chart: Chart) -> Markup:
    """Draws a chart with its legend; its points go along, for the pointer to read."""
    # 1. what is drawn, and on which axes
    drawn = [
        (one, [(x, y) for x, y in thinned([p for p in one.points if math.isfinite(p[1])])]) for one in chart.series
    ]
    drawn = [(one, points) for one, points in drawn if points]
    xs, ys = ([point[k] for _, points in drawn for point in points] for k in (0, 1))
    if not xs:
        return Markup("")
    is_log = chart.axis == "log" and min(ys) > 0 and max(ys) > 50 * min(ys)
    x_low, x_high = 0.0, max(1.0, *xs)
    if chart.axis == "share":
        y_low, y_high = _range([0.0, 1.0, *ys], 0.02)
    else:
        y_low, y_high = _range([math.log10(y) for y in ys] if is_log else ys, 0.05)

    def at(x: float, y: float) -> tuple[float, float]:
        height = math.log10(y) if is_log else y
        return (
            round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - (height - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1),
        )

    # 2. axes
    lines = []
    heights = _powers(y_low, y_high) if is_log else ticks(y_low, y_high)
    for value in heights:
        y = at(x_low, value)[1]
        lines.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{short(value)}</text>')
    for value in (value for value in ticks(x_low, x_high) if value % 1 == 0):
        x = at(value, 10**y_low if is_log else y_low)[0]
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        lines.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 15}" text-anchor="{anchor}">{short(value)}</text>')
    lines.append(f'<text x="{(WIDTH + LEFT) // 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(chart.along)}</text>')
    # 3. curves, and what the pointer reads
    data, legend = [], []
    for one, points in drawn:
        style = f"c{one.color} d{one.dash}"
        places = [at(x, y) for x, y in points]
        if one.is_once:
            lines.append(f'<path class="once {style}" d="M{LEFT} {places[0][1]}H{WIDTH - RIGHT}"/>')
        elif len(points) > 1:
            lines.append(f'<polyline class="{style}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
        if len(points) <= 30 and not one.is_once:
            lines += [f'<circle class="{style}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in places]
        label = printable(one.label)
        legend.append(f'<li class="{style}{" once" if one.is_once else ""}"><b></b>{escape(label)}</li>')
        values = [[place[0], x, y] for place, (x, y) in zip(places, points, strict=True)]
        data.append({"label": label, "points": [[p, float(f"{x:.6g}"), float(f"{y:.4g}")] for p, x, y in values]})
    log = " (logarithmic)" if is_log else ""
    return Markup(
        f"<figure class=chart><h3>{escape(printable(chart.title))}{log}</h3>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-points="{escape(json.dumps(data))}">{"".join(lines)}'
        f'<path class="pointer" d=""/></svg><ul class=legend>{"".join(legend)}</ul></figure>'
    )


def _range(values: Iterable[float], margin: float) -> tuple[float, float]:
    values = list(values)
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(1.0, abs(high)):
        spread = abs(high) / 10 or 1.0
        return low - spread, high + spread
    return low - margin * (high - low), high + margin * (high - low)


def _powers(low: float, high: float) -> list[float]:
    """Chooses the powers of ten between two logarithms; every other one where they are many."""
    exponents = range(math.ceil(low), math.floor(high) + 1)
    return [10.0**k for k in exponents if len(exponents) <= 6 or k % 2 == 0]
