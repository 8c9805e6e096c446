"""The quickstarts that see, against SFT and naive OPSD at equal updates, over seeds: ``make seeing`` writes
docs/vision_language.png, docs/gui_grounding.png and a result.json for each. Name a setting to run it alone, and
``--jobs 2`` to have two runs at a time.

All start from the same student and see the same number of examples; ``sft`` is trained on what the teacher writes
while it looks at its view, sampled anew for every update.
"""

from __future__ import annotations

import argparse
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from quickstart import fit, plot

from opd_lightning.report import Curves

RUNS, SEEDS = Path("runs/seeing"), (0, 1, 2)
TOLD = "--model.teachers.teacher.view=CoordinatesAsText"
ARMS: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "vision_language": {"self-distillation": ([], []), "SFT": (["sft"], [])},
    "gui_grounding": {"self-distillation": ([], []), "SFT": (["sft"], []), "naive OPSD": ([], [TOLD])},
}


def average(runs: list[Curves], name: str) -> list[tuple[int, float]]:
    """A curve's mean over runs that were validated at the same steps."""
    return [(step, mean(dict(run[name])[step] for run in runs)) for step, _ in runs[0][name]]


def train(setting: str, arm: str, seed: int) -> tuple[Curves, float]:
    overlays, extra = ARMS[setting][arm]
    folder = RUNS / setting / f"{arm} {seed}"
    shutil.rmtree(folder, ignore_errors=True)
    curves, wall = fit(folder, setting, overlays, [f"--seed_everything={seed}", *extra])
    print(f"{setting:16} {arm:18} {seed} {curves['val/accuracy']} {wall:.0f} s", flush=True)
    return curves, wall


def main(settings: list[str], jobs: int) -> None:
    for setting in settings or list(ARMS):
        wanted = [(setting, arm, seed) for seed in SEEDS for arm in ARMS[setting]]
        with ThreadPoolExecutor(jobs) as pool:
            found = dict(zip(wanted, pool.map(lambda run: train(*run), wanted), strict=True))
        results = [
            {"setting": setting, "arm": arm, "seed": seed, "wall_s": round(wall)}
            | {name: dict(points) for name, points in curves.items() if "accuracy" in name}
            for (setting, arm, seed), (curves, wall) in found.items()
        ]
        drawn: dict[str, Curves] = {
            arm: {"val/accuracy": average([found[setting, arm, seed][0] for seed in SEEDS], "val/accuracy")}
            for arm in ARMS[setting]
        }
        plot(drawn, Path("docs") / f"{setting}.png", f"{setting}: mean of {len(SEEDS)} seeds")
        (RUNS / setting / "result.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", choices=list(ARMS), help="default: all")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    main(options.settings, options.jobs)
