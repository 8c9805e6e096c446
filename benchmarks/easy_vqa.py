"""easy-VQA (real image files, 13 answers) with the vision quickstart's recipe: `python benchmarks/easy_vqa.py FOLDER`.

FOLDER holds easy_vqa.zip or what it unpacks to. A model from random weights is trained on answers, four fifths of
them with the sharp image; then it learns from itself to answer while it sees the image with 16 × 16 pixels. SFT on what
the teacher writes does the same number of updates. Writes runs/easy_vqa/result.json.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from quickstart import fit

RUNS = Path("runs/easy_vqa")
SMALL = "{class_path: Downscale, init_args: {longest: 16}}"
SOURCE = "python:opd_lightning.modalities.vision_language.readers.easy_vqa"


def data(folder: str, count: int, seed: int) -> list[str]:
    held_out = f"{{folder: {folder}, split: test, count: 512}}"
    return [
        f"--data.train={SOURCE}",
        f"--data.train_options={{folder: {folder}, count: {count}, seed: {seed}}}",
        f"--data.validation={SOURCE}",
        f"--data.validation_options={held_out}",
        "--data.columns={completion: answer, answer: answer}",
        "--model.evaluation.by=[category]",
    ]


def main(folder: str) -> None:
    shutil.rmtree(RUNS, ignore_errors=True)
    either = f"{{class_path: Mixture, init_args: {{share: 0.8, view: Original, otherwise: {SMALL}}}}}"
    warm = RUNS / "warm_start"
    opd = [sys.executable, "-m", "opd_lightning"]
    into = f"--trainer.default_root_dir={warm}"
    more = [f"--model.student_view={either}", "--trainer.max_steps=400", "--trainer.val_check_interval=200"]
    subprocess.run(
        [*opd, "fit", "-c", "opd:vision_language/warm_start.yaml", into, *more, *data(folder, 25600, 0)], check=True
    )
    subprocess.run([*opd, "export", str(warm / "checkpoints/last.ckpt"), str(RUNS / "student")], check=True)

    results = []
    for arm, overlays in {"self-distillation": [], "SFT": ["sft"]}.items():
        extra = [
            f"--model.student.path={RUNS / 'student'}",
            f"--model.student_view={SMALL}",
            "--model.teachers.teacher.view=Original",
            *data(folder, 8000, 1),
        ]
        curves, wall = fit(RUNS / arm, "vision_language", overlays, extra)
        values = {name: points for name, points in curves.items() if "accuracy" in name}
        results.append({"arm": arm, "wall_s": round(wall), **values})
        print(arm, curves["val/accuracy"], f"{wall:.0f} s", flush=True)
    (RUNS / "result.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
