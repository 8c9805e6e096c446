"""Measures what papers claim, and writes docs/claims.md: ``make claims``.

A claim is a module of this package: its docstring states it, with its source and how it is measured, ``measure(seed)``
returns its numbers, ``RULES`` decide the verdict, and ``TRIED`` says what else was tried. Results are kept in
benchmarks/claims.json, so that a stopped run goes on; without that file all are measured again. Names on the command
line measure these claims alone.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import resource
from pathlib import Path
from types import ModuleType
from typing import Any

from opd_lightning.modalities.autoregressive.elsewhere.store import write_whole

from .verdict import short, spread, verdict

SEEDS = (0, 1, 2)
ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "claims.json", ROOT / "docs" / "claims.md"
START, END = "<!-- make claims -->", "<!-- end -->"
CLAIMS = (
    "on_policy",
    "own_samples",
    "horizon",
    "staleness",
    "freshness",
    "variance",
    "baseline",
    "extrapolation",
    "pass_rate",
    "overlap",
    "tail",
    "live_teacher",
    "length",
    "wrong_privilege",
)
CPU = "CPU s"

Results = dict[str, dict[str, dict[str, float]]]


def known() -> Results:
    """Reads what was measured so far, by claim and seed."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def keep(results: Results) -> None:
    write_whole(RESULTS, json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def load(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


def seconds() -> float:
    """Returns the CPU time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(name: str, again: bool = False) -> None:
    """Measures the seeds of a claim that are not known yet; each is kept as soon as it is there."""
    for seed in SEEDS:
        if str(seed) in known().get(name, {}) and not again:
            continue
        since = seconds()
        numbers = load(name).measure(seed)
        results = known()
        results.setdefault(name, {})[str(seed)] = {**numbers, CPU: round(seconds() - since, 1)}
        keep(results)
        print(name, seed, results[name][str(seed)], flush=True)


def numbers_of(runs: dict[str, dict[str, float]]) -> dict[str, list[float]]:
    """Collects a claim's numbers by what was measured, over seeds."""
    ordered = [runs[seed] for seed in sorted(runs)]
    return {name: [run[name] for run in ordered] for name in ordered[0]}


def statement(claim: Any) -> tuple[str, str, str]:
    """Splits a claim's docstring: what is claimed, by whom, and how it is measured."""
    title, source, *rest = inspect.getdoc(claim).split("\n\n")
    return title.rstrip("."), " ".join(source.split()).removeprefix("Source: ").rstrip("."), "\n\n".join(rest)


def row(place: int, claim: Any, runs: dict[str, dict[str, float]]) -> str:
    """Formats a claim's line of the table."""
    title, source, _ = statement(claim)
    numbers = numbers_of(runs)
    fulfilled = sum(rule.holds(numbers) for rule in claim.RULES)
    cells = [
        str(place),
        title,
        source,
        f"**{verdict(claim.RULES, numbers)}**",
        f"{fulfilled} of {len(claim.RULES)}",
        str(len(runs)),
        f"{sum(numbers[CPU]):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def section(place: int, claim: Any, runs: dict[str, dict[str, float]]) -> str:
    """Writes a claim's paragraphs: how it was measured, the numbers, the verdict, and what was tried."""
    title, source, method = statement(claim)
    numbers = numbers_of(runs)
    # what rules read comes first
    ordered = dict.fromkeys([*(name for rule in claim.RULES for name in rule.names), *numbers])
    keys = [name for name in ordered if name != CPU]
    lines = [f"## {place}. {title}", "", f"Source: {source}.", "", method, ""]
    seeds = " | ".join(f"seed {seed}" for seed in sorted(runs))
    lines += [f"| measured | {seeds} | mean |", "|---|" + "---|" * (len(runs) + 1)]
    lines += [f"| {key} | {' | '.join(map(short, numbers[key]))} | {spread(numbers[key])} |" for key in keys]
    lines += ["", *(f"* {rule.text}: {'yes' if rule.holds(numbers) else '**no**'}" for rule in claim.RULES), ""]
    lines += [f"Verdict: **{verdict(claim.RULES, numbers)}**."]
    if tried := getattr(claim, "TRIED", ""):
        lines[-1] += f" {tried}"
    return "\n".join(lines)


def write() -> None:
    """Puts the table and the sections between the two comments of the page."""
    results = known()
    done = [(place, load(name), results[name]) for place, name in enumerate(CLAIMS, 1) if name in results]
    table = [
        "| | claim | source | verdict | rules fulfilled | seeds | CPU s |",
        "|---|---|---|---|---|---|---|",
        *(row(*claim) for claim in done),
    ]
    parts = ["\n".join(table), *(section(*claim) for claim in done)]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    write_whole(PAGE, before + START + "\n\n" + "\n\n".join(parts) + "\n\n" + END + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(CLAIMS)}")
    parser.add_argument("--again", action="store_true", help="measure also what is known")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the page")
    options = parser.parse_args()
    if unknown := set(options.names) - set(CLAIMS):
        parser.error(f"no claim {', '.join(sorted(unknown))}; there are {', '.join(CLAIMS)}")
    for name in [] if options.table else options.names or CLAIMS:
        measure(name, options.again)
        write()
    write()


if __name__ == "__main__":
    main()
