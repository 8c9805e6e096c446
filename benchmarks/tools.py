"""text/tools.yaml against SFT and SOD over seeds: ``make tools`` writes the table of docs/tools.md.

All arms start from the same student and do as many updates on as many trajectories; SFT's are the teacher's, sampled
anew for every update. A run whose result is in benchmarks/tools.json is not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from opd_lightning.modalities.autoregressive.elsewhere.store import write_whole
from opd_lightning.report import Curves, read_curves

RUNS, RESULTS, PAGE = Path("runs/tools"), Path("benchmarks/tools.json"), Path("docs/tools.md")
START, END = "<!-- make tools -->", "<!-- end -->"
GROUPS = ["-c", "opd:methods/text/sod.yaml", "--model.rollout.batch_size=4"]
PLAIN = {"class_path": "RewardPlusLogRatio", "init_args": {"against": "behavior"}}
SIGNAL = {"class_path": "PolicyGradient", "init_args": {"clip": 0.2, "clip_high": 0.28, "advantage": PLAIN}}
ARMS: dict[str, list[str]] = {
    "reverse KL on its own rollouts": [],
    "SFT on the teacher's": ["-c", "opd:methods/sft.yaml"],
    "SOD": GROUPS,
    "SOD without its weights": [*GROUPS, f"--model.objective.terms={json.dumps([{'signal': SIGNAL}])}"],
}
METRICS = ("accuracy", "calls", "malformed")


def train(arm: str, seed: int) -> dict[str, Any]:
    """Runs an arm; returns each metric before and after."""
    folder = RUNS / f"{arm} {seed}"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "opd_lightning", "fit", "-c", "opd:text/tools.yaml", *ARMS[arm]]
    subprocess.run([*command, f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}"], check=True)
    curves = read_curves(folder)
    teacher = {name: curves[f"val/teacher/{name}"][0][1] for name in METRICS if f"val/teacher/{name}" in curves}
    return {"arm": arm, "seed": seed, "teacher": teacher} | {
        moment: {name: _point(curves, name, at) for name in METRICS} for moment, at in (("before", 0), ("after", -1))
    }


def _point(curves: Curves, name: str, at: int) -> float:
    return float(curves[f"val/{name}"][at][1])


def table(results: list[dict[str, Any]]) -> str:
    """Writes a line for each arm: means over seeds, ± their deviation."""
    lines = ["| | accuracy, % | calls per problem | malformed of them | seeds |", "|---|---|---|---|---|"]
    first = results[0]
    for name, values in (("the teacher", first["teacher"]), ("the student before", first["before"])):
        lines.append(f"| {name} | {_cells([values])} | |")
    for arm in ARMS:
        rows = [row["after"] for row in results if row["arm"] == arm]
        if rows:
            lines.append(f"| {arm} | {_cells(rows)} | {len(rows)} |")
    return "\n".join(lines)


def _cells(rows: list[dict[str, float]]) -> str:
    cells = []
    for name in METRICS:
        values = [row[name] * (100 if name == "accuracy" else 1) for row in rows]
        digits = 1 if name == "accuracy" else 2
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.{digits}f}{spread}")
    return " | ".join(cells)


def main(arms: list[str], seeds: list[int], only_table: bool) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    for seed in seeds:
        for arm in arms or ARMS:
            if not only_table and not any(row["arm"] == arm and row["seed"] == seed for row in results):
                results.append(train(arm, seed))
                write_whole(RESULTS, json.dumps(results, indent=1) + "\n")
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    write_whole(PAGE, f"{before}{START}\n{table(results)}\n\n{END}{after}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arms", nargs="*", choices=[*ARMS, []], help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="write the table of what is there, run nothing")
    given = parser.parse_args()
    main(given.arms, given.seeds, given.table)
