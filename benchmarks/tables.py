"""Writes the tables of docs/performance.md from runs/bench/*.json: ``python benchmarks/tables.py``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from side_by_side import FOLDER, share_of

PAGE = Path("docs/performance.md")


def read(name: str) -> dict[str, Any] | None:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def steps() -> list[str]:
    rows = [
        "| case | opd, s | peer, s | ratio | per token | CPU time | peak, MB | ratio | opd's phases | peer's phases |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(FOLDER.glob("step-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        result, peer = record["results"], record["settings"].get("peer", "trl")
        mine, theirs, ratio = result["ours"], result[peer], result["ratios"]
        rows.append(
            f"| {path.stem.removeprefix('step-')} | {mine['seconds']:.2f} | {theirs['seconds']:.2f} | "
            f"**{ratio['seconds']:.2f}** | {ratio['seconds_per_token']:.2f} | {ratio['cpu_seconds']:.2f} | "
            f"{mine['peak_mb']:.0f} / {theirs['peak_mb']:.0f} | **{ratio['peak_mb']:.2f}** | "
            f"{share_of(mine['phases'], mine['mean_seconds'])} | {share_of(theirs['phases'], theirs['mean_seconds'])} |"
        )
    return rows


def objective(name: str) -> list[str]:
    found = read(name)
    if found is None:
        return ["not measured"]
    results = found["results"]
    rows = [
        "| | time, s | CPU time, s | peak above the inputs, MB | loss | norm of the gradient |",
        "|---|---|---|---|---|---|",
    ]
    for case, result in results.items():
        rows.append(
            f"| {case} | {result['seconds']:.2f} | {result['cpu_seconds']:.2f} | {result['peak_mb']:.0f} | "
            f"{result['loss']:.6f} | {result['gradient_norm']:.6f} |"
        )
    settings = found["settings"]
    return [
        f"{settings['steps']:,} steps × {settings['vocabulary']:,} ids, {settings['threads']} thread(s), median of "
        f"{settings['repeats']}:",
        "",
        *rows,
    ]


def rollouts() -> list[str]:
    found: dict[str, Any] = read("rollout") or {}
    rows = [
        "| case | tokens | engine, s | `generate`, s | bare loop, s | `generate` / engine | engine, tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, result in found.items():
        seconds, faster = result["seconds"], result["engine_is_faster_than"]
        rows.append(
            f"| {case} | {result['tokens']} | {seconds['engine']:.2f} | {seconds['generate']:.2f} | "
            f"{seconds['bare loop']:.2f} | **{faster['generate']:.2f}** | {result['tokens_per_s']['engine']} |"
        )
        if "apart" in seconds:
            rows.append(f"| 8 different prompts | | {seconds['apart']:.2f} | | | {faster['apart']:.2f} × the group | |")
    return rows


def plain(name: str) -> list[str]:
    found = read(name)
    if found is None:
        return ["not measured"]
    numbers = {key: value for key, value in found["results"].items() if isinstance(value, float)}
    shown = {key: f"{value:.1%}" if "share" in key else f"{value:.3f}" for key, value in numbers.items()}
    return ["| | |", "|---|---|", *(f"| {key.replace('_', ' ')} | {value} |" for key, value in shown.items())]


def fits() -> list[str]:
    found, checked = read("fits"), read("fits-check")
    if found is None or checked is None:
        return ["not computed"]
    sizes = found["settings"]["sizes"]
    rows = ["Computed:", "", f"| student | teacher | {' | '.join(f'{size} GB' for size in sizes)} |"]
    rows.append("|---" * (2 + len(sizes)) + "|")
    for name, cells in found["results"].items():
        shown = [
            f"**{cell['tokens']:,}** {cell['phase']}: {cell['term']}" if cell["tokens"] else "does not fit"
            for cell in cells
        ]
        rows.append(f"| {name} | {' | '.join(shown)} |")
    rows += ["", f"Checked on a CPU, {checked['date']}:", ""]
    rows += ["| | computed, GB | measured, GB | off by | of the two, weights | phase: largest term |", "|---" * 6 + "|"]
    for case, cell in checked["results"].items():
        computed, measured = cell["predicted_gb"], cell["gb"]
        rows.append(
            f"| {case} | {computed:.2f} | {measured:.2f} | {computed / measured - 1:+.0%} | {cell['weights_gb']:.2f} | "
            f"{cell['phase']}: {cell['term']} |"
        )
    return rows


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    tables = {
        "step": steps(),
        "objective": objective("objective"),
        "objective-jsd": objective("objective-jsd"),
        "rollout": rollouts(),
        "overhead": plain("overhead"),
        "resume": plain("resume"),
        "fits": fits(),
    }
    for name, rows in tables.items():
        inside = "\n".join(["", "", *rows, "", ""])
        text = re.sub(
            rf"(<!-- {name} -->).*?(<!-- end -->)", lambda m, t=inside: m[1] + t[1:] + m[2], text, flags=re.DOTALL
        )
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
