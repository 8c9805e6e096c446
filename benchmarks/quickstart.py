"""Some methods on the quickstart, side by side: ``make methods-quickstart`` draws docs/methods.png, few_problems.png.

Every run starts from the same student and does the same number of updates on batches of the same size.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from opd_lightning.report import Curves, new_figure, read_curves

RUNS = Path("runs/methods")
SLOWER = ["--model.optimizer.lr=3e-4"]
# The overlay, and what a model and rollouts this small ask for where a paper's defaults are for billions and thousands.
METHODS: dict[str, list[str]] = {
    "reverse_kl": [],
    "gkd": [],
    "minillm": SLOWER,
    "esr": ["--model.rollout.horizon=24"],
    "text/opsd": SLOWER,
    "text/sdft": SLOWER,
    "sft": [],
}
# Two hundred problems only, again and again: what the teacher writes about them runs out, what the student does not.
FEW = [
    "--trainer.max_steps=500",
    "--trainer.val_check_interval=100",
    "--data.train_options.count=200",
]
PROBLEMS = (5, 6, 7)


def fit(
    folder: Path, setting: str, overlays: list[str], extra: list[str], file: Path | None = None
) -> tuple[Curves, float]:
    """Trains a setting's quickstart with overlays and further arguments; its curves, and the seconds it took."""
    since = time.time()
    command = [sys.executable, "-m", "opd_lightning", "fit", "-c", f"opd:{setting}/quickstart.yaml"]
    command += [part for overlay in overlays for part in ("-c", f"opd:methods/{overlay}.yaml")]
    command += [] if file is None else ["-c", str(file)]
    command += [f"--trainer.default_root_dir={folder}", *extra]
    subprocess.run(command, check=True)
    return read_curves(folder), time.time() - since


def plot(found: dict[str, Curves], path: Path, title: str) -> None:
    figure = new_figure(7, 4.2)
    axis = figure.subplots()
    for name, curves in found.items():
        steps, values = zip(*curves["val/accuracy"], strict=True)
        axis.plot(steps, values, marker=".", label=name)
    axis.set(title=title, xlabel="student updates", ylabel="held-out accuracy", ylim=(0, 1.02))
    axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    results = []
    few = {
        f"{overlay}, problems {seed}": [*FEW, f"--data.train_options.seed={seed}"]
        for seed in PROBLEMS
        for overlay in ("reverse_kl", "sft")
    }
    for group, title, runs in (
        ("methods", "Methods on the quickstart", METHODS),
        ("few_problems", "200 training problems", few),
    ):
        found = {}
        for run, extra in runs.items():
            overlay, name = run.partition(",")[0], run.removeprefix("text/")
            curves, wall = fit(RUNS / group / name, "text", [overlay], extra)
            found[name] = curves
            accuracy = [value for _, value in curves["val/accuracy"]]
            results.append({"group": group, "run": name, "accuracy": accuracy, "wall_s": round(wall)})
            print(f"{group:14} {name:20} {' '.join(f'{value:.3f}' for value in accuracy)}  {wall:.0f} s")
        plot(found, Path("docs") / f"{group}.png", title)
    (RUNS / "result.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
