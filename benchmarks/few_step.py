"""Few-step methods on the diffusion quickstart at equal numbers of network evaluations, over seeds: ``make few-step``
writes docs/few_step.png and runs/few_step/result.json.

An evaluation is one latent through one network once, whoever it is for: rollouts, teachers, the student, a fake score.
All start from the teacher's own weights. D-OPSD, which starts from a few-step student and learns something else, is
``--d-opsd``: with the paper's average, and with the live student as its teacher (rate 1).
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

from opd_lightning.modalities.diffusion.table import by_steps, closed
from opd_lightning.shipped import shipped

RUNS = Path("runs/few_step")
BUDGET = 120_000
LARGER = "--model.rollout.batch_size=128"
# overlays, evaluations per optimizer step (measured; `train/network_evaluations` says them), and more arguments
ARMS: dict[str, tuple[list[str], int, list[str]]] = {
    "flow map, on-policy": ([], 663, []),
    "flow map, off-policy": (["diffusion/flow_map_off_policy"], 632, []),
    "flow map from images (AnyFlow stage 1)": (["diffusion/flow_map_forward"], 384, [LARGER]),
    "AnyFlow, both stages": (["diffusion/anyflow"], 283, []),
    "distribution matching (DMD2)": (["diffusion/dmd2"], 547, []),
    "velocity matching, guidance 1.5": (["diffusion/transition_matching"], 768, []),
    "Gaussian KL, guidance 1.5": (["diffusion/gaussian_kl"], 1728, []),
}
# whose first row is the teacher's own sampler; the chain of distribution matching is another one
MEASURED_BEFORE = "flow map, on-policy", "distribution matching (DMD2)"
TOLD: dict[str, list[str]] = {
    "average, rate 0.0001": [],
    "live student (rate 1)": ["--model.teachers.teacher.weights.rate=1.0"],
}


def halves(folder: Path, updates: int) -> Path:
    """AnyFlow's stages, each half of the updates."""
    overlay = yaml.safe_load(Path(shipped("opd:methods/diffusion/anyflow.yaml")).read_text(encoding="utf-8"))
    callbacks = overlay["trainer"]["callbacks+"]
    callbacks[0]["init_args"]["stages"][0]["steps"] = updates // 2
    path = folder / "stages.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}), encoding="utf-8")
    return path


def train(arm: str, seed: int, overlays: list[str], updates: int, extra: list[str]) -> dict[str, Any]:
    folder = RUNS / f"{arm} {seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stages = halves(folder, updates) if overlays == ["diffusion/anyflow"] else None
    length = [f"--trainer.max_steps={updates}", f"--trainer.val_check_interval={updates}"]
    epochs = ["--data.train_options.repeat=8"] if LARGER in extra else []
    if arm in ARMS and arm not in MEASURED_BEFORE:
        extra = [*extra, "--model.evaluation.before=false"]
    curves, wall = fit(folder, "diffusion", overlays, [f"--seed_everything={seed}", *length, *extra, *epochs], stages)
    found: dict[str, Any] = {"arm": arm, "seed": seed, "updates": updates, "wall_s": round(wall)}
    found["fid"] = by_steps(curves, "val", -1)
    found["teacher"], found["before"] = by_steps(curves, "val/teacher", 0), by_steps(curves, "val", 0)
    found["evaluations"] = round(mean(value for _, value in curves["train/network_evaluations"]))
    found["reward"] = curves["val/accuracy"][-1][1] if "val/accuracy" in curves else None
    distances = {k: round(v, 2) for k, v in found["fid"].items()}
    print(f"{arm:40} {seed} {distances} {found['evaluations']} {found['reward']} {wall:.0f} s", flush=True)
    return found


def main(told: bool, arms: list[str], seeds: int, jobs: int) -> None:
    if told:
        wanted = [(arm, seed, ["diffusion/d_opsd"], 400, extra) for seed in range(seeds) for arm, extra in TOLD.items()]
    else:
        chosen = {arm: ARMS[arm] for arm in arms or ARMS}
        wanted = [
            (arm, seed, overlays, BUDGET // cost, extra)
            for seed in range(seeds)
            for arm, (overlays, cost, extra) in chosen.items()
        ]
    RUNS.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(jobs) as pool:
        for run in pool.map(lambda wish: train(*wish), wanted):
            found.append(run)
            (RUNS / ("d_opsd.json" if told else "result.json")).write_text(
                json.dumps(found, indent=2) + "\n", encoding="utf-8"
            )
    aims = {run["seed"]: run["teacher"] for run in found if run["arm"] == MEASURED_BEFORE[0]}
    for arm in dict.fromkeys(run["arm"] for run in found):
        mine = [run for run in found if run["arm"] == arm]
        counts = list(mine[0]["fid"])
        if mine[0]["teacher"]:
            row = " | ".join(f"{mean(run['teacher'][k] for run in mine):.2f}" for k in counts)
            print(f"| the teacher, beside {arm} | {row} | |")
        row = " | ".join(f"{mean(run['fid'][k] for run in mine):.2f}" for k in counts)
        gaps = [closed(aims[run["seed"]][4], run["fid"][4], aims[run["seed"]][32]) for run in mine if aims]
        shares = f" | {mean(gaps):.0%} ({min(gaps):.0%} to {max(gaps):.0%})" if gaps else ""
        print(f"| {arm} | {row}{shares} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arms", nargs="*", help="default: all")
    parser.add_argument("--d-opsd", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    main(options.d_opsd, options.arms, options.seeds, options.jobs)
