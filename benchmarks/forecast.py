"""The time that a run takes, as `opd check` computes it beforehand, against what it then took.

    python benchmarks/forecast.py [CASE …] [--steps N]

Both are counted in CPU seconds of one thread, from the evaluation before training to the last update, so that other
work on the machine does not decide. Loading is no part of either. ``--steps`` shortens runs, with a validation of 32
rows halfway and at the end. Writes runs/bench/forecast.json, and the runs to runs/forecast/CASE.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from side_by_side import FOLDER, record

TEXT = ["-c", "opd:text/quickstart.yaml", "--data.train_options.count=4000"]
CASES: dict[str, list[str]] = {
    "text": TEXT,
    "images": ["-c", "opd:vision_language/quickstart.yaml", "--data.train_options.count=500"],
    "screens": ["-c", "opd:gui_grounding/quickstart.yaml"],
    "diffusion": ["-c", "opd:diffusion/quickstart.yaml"],
    "LoRA": [
        *(*TEXT, "--model.student.lora={r: 16, alpha: 32}", "--trainer.max_steps=80"),
        *("--model.rollout.batch_size=32", "--data.validation_options.count=128"),
    ],
    "several updates a rollout": [
        *(*TEXT, "--trainer.max_steps=120", "--model.rollout.batch_size=16"),
        *("--model.rollout.group_size=4", "--model.rollout.micro_batch_size=16", "--model.rollout.epochs=2"),
    ],
    "own teacher, shown the solution": [
        *(*TEXT, "-c", "opd:methods/text/opsd.yaml", "--trainer.max_steps=60"),
    ],
    "long": ["-c", "opd:text/long.yaml"],
}


def shorter(steps: int) -> list[str]:
    """Arguments that shorten a run."""
    trainer = {"max_steps": steps, "val_check_interval": steps // 2, "limit_val_batches": 1}
    return [*(f"--trainer.{key}={value}" for key, value in trainer.items()), "--data.validation_batch_size=32"]


def forecast(arguments: list[str]) -> dict[str, float]:
    """Looks at a run as `opd check` does."""
    from opd_lightning.check import APART
    from opd_lightning.foresight import Foresight
    from opd_lightning.look import LookCLI

    with tempfile.TemporaryDirectory() as folder:
        foresight = Foresight(Path(folder) / "check")
        apart = [f"--trainer.default_root_dir={folder}", f"--checkpoint.dirpath={folder}"]
        LookCLI(["fit", *arguments, *APART, *apart], foresight)
    assert foresight.pace is not None
    updates, validations = foresight.pace.to_end()
    return {"updates": updates, "validations": validations, "timed": len(foresight.pace.seconds)}


def run(arguments: list[str], folder: str) -> dict[str, float]:
    """Runs it to its end."""
    import lightning as L

    from opd_lightning.cli import OPDCLI

    class Watch(L.Callback):
        since = end = validating = 0.0

        def on_train_start(self, *args: Any) -> None:
            self.since = time.perf_counter()

        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
            if trainer.global_step == 0 and index == 0:
                self.validating = time.perf_counter() - self.since  # before training; the first rollout is with it

        def on_validation_start(self, *args: Any) -> None:
            self.begun = time.perf_counter()

        def on_validation_end(self, *args: Any) -> None:
            self.validating += time.perf_counter() - self.begun

        def on_train_end(self, *args: Any) -> None:
            self.end = time.perf_counter()

    watch = Watch()
    OPDCLI(["fit", *arguments, f"--trainer.default_root_dir={folder}"], [watch])
    return {"all": watch.end - watch.since, "validations": watch.validating}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--steps", type=int, help="optimizer steps of each; default: those of its configuration")
    args = parser.parse_args()
    time.perf_counter = time.process_time  # before anything imports it
    torch.set_num_threads(1)
    path = FOLDER / "forecast.json"
    for case in args.cases or CASES:
        arguments = [*CASES[case], *(shorter(args.steps) if args.steps else ())]
        found = {"forecast": forecast(arguments), "run": run(arguments, f"runs/forecast/{case}")}
        computed, taken = found["forecast"]["updates"] + found["forecast"]["validations"], found["run"]["all"]
        results = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
        results[case] = found | {"computed": computed, "taken": taken, "steps": args.steps}
        print(f"{case}: {computed:.1f} s computed, {taken:.1f} s taken", flush=True)
        record("forecast", {}, results)


if __name__ == "__main__":
    main()
