"""Time and size of saving and restoring a run in the middle of an epoch, beside a bare ``torch.save`` of its tensors.

    python benchmarks/resume.py [--vocabulary 151936]

A checkpoint holds the student, AdamW's two moments, and what the loader has rolled out and not yet trained; not the
frozen teacher. Restoring is timed from the call of ``fit`` to the first step. Writes runs/bench/resume.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from side_by_side import FOLDER, MB, bare_trainer, prompts, record, write_models

from opd_lightning.data import PromptData
from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.modalities.text import TextDistillation
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Frozen, Teacher


class Started(L.Callback):
    def on_train_start(self, *_: Any) -> None:
        self.at = time.perf_counter()


def trainer_and_module(folder: Path, models: Path, steps: int, started: Started) -> tuple[L.Trainer, TextDistillation]:
    module = TextDistillation(
        student=Pretrained(str(models / "student")),
        teachers={"teacher": Teacher(Frozen(Pretrained(str(models / "teacher"))))},
        objective=Objective([Term(ReverseKL())]),
        rollout=Rollout(batch_size=8, micro_batch_size=4, horizon=16),
        evaluation=Evaluation(before=False),
    )
    return bare_trainer(steps, folder, started), module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    models = FOLDER / f"models-{args.vocabulary}"
    write_models(models, args.vocabulary)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        folder = Path(name)
        source, path, bare = folder / "prompts.jsonl", folder / "run.ckpt", folder / "bare.pt"
        source.write_text("".join(json.dumps(row) + "\n" for row in prompts(64, args.vocabulary)), encoding="utf-8")
        started = Started()
        trainer, module = trainer_and_module(folder, models, 3, started)
        begin = time.perf_counter()
        trainer.fit(module, PromptData(train=str(source)))
        fresh = started.at - begin
        saves, plain = [], []
        for _ in range(args.repeats):
            begin = time.perf_counter()
            trainer.save_checkpoint(path)
            saves.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            torch.save([module.student.state_dict(), trainer.optimizers[0].state_dict()], bare)
            plain.append(time.perf_counter() - begin)
        trainer, module = trainer_and_module(folder, models, 4, started)
        begin = time.perf_counter()
        trainer.fit(module, PromptData(train=str(source)), ckpt_path=str(path))
        results = {
            "size_mb": path.stat().st_size / MB,
            "bare_size_mb": bare.stat().st_size / MB,
            "save_seconds": statistics.median(saves),
            "bare_save_seconds": statistics.median(plain),
            "start_seconds": fresh,
            "resumed_start_seconds": started.at - begin,
        }
    for name, value in results.items():
        print(f"{name:24}{value:.2f}")
    record("resume", vars(args), results)


if __name__ == "__main__":
    main()
