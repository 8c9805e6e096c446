"""Early stop and staleness on the text quickstart, over seeds: ``make horizons`` prints both tables of docs/horizons.md
and writes runs/horizons/result.json.

Tokens are those that were generated for training; wall time is a whole process, validation and start included.
"""

from __future__ import annotations

import argparse
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from quickstart import fit

RUNS, SEEDS, UPDATES = Path("runs/horizons"), (0, 1, 2), 200
LAG = "--model.rollout.max_staleness=8"


def stop(rule: str, **settings: Any) -> dict[str, Any]:
    made = {"class_path": rule, "init_args": settings}
    return {"class_path": "EarlyStopRollout", "init_args": {"rule": made}}


ARMS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "full rollouts": ([], []),
    "ESR, first 24": ([stop("FirstSteps", steps=24)], []),
    "ESR, first 36": ([stop("FirstSteps", steps=36)], []),
    "adaptive window (after ADWIN)": ([stop("AdaptiveWindow", smallest=16)], []),
    "lag 8": ([], [LAG]),
    "lag 8, freshness control": ([{"class_path": "FreshnessControl"}], [LAG]),
}


def train(arm: str, seed: int) -> dict[str, Any]:
    callbacks, extra = ARMS[arm]
    folder = RUNS / f"{arm} {seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    overlay = folder / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks, "max_steps": UPDATES}}), encoding="utf-8")
    settings = [f"--seed_everything={seed}", "--trainer.log_every_n_steps=1", *extra]
    curves, wall = fit(folder, "text", [], settings, overlay)
    found = {
        "arm": arm,
        "seed": seed,
        "accuracy": dict(curves["val/accuracy"]),
        "tokens": round(sum(64 * value for _, value in curves["train/length"])),
        "wall_s": round(wall),
    }
    print(found, flush=True)
    return found


def main(arms: list[str], jobs: int) -> None:
    wanted = [(arm, seed) for seed in SEEDS for arm in arms or ARMS]
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda run: train(*run), wanted))
    (RUNS / "result.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for arm in arms or ARMS:
        mine = [run for run in results if run["arm"] == arm]
        steps = sorted(mine[0]["accuracy"])
        row = " | ".join(f"{100 * mean(run['accuracy'][step] for run in mine):.1f}" for step in steps)
        print(f"| {arm} | {row} | {mean(r['tokens'] for r in mine):.0f} | {mean(r['wall_s'] for r in mine):.0f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arms", nargs="*", help="default: all")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    main(options.arms, options.jobs)
