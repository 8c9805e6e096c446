"""What fits into a GPU's memory: the peak of one training step, computed phase by phase from the models' shapes.

    python benchmarks/fits.py            the table, computed
    python benchmarks/fits.py --recipes  the largest student of each recipe of docs/recipes.md, computed
    python benchmarks/fits.py --check    training steps on this CPU, predicted and measured; Linux only
    python benchmarks/fits.py --runs     runs of `opd fit` on this CPU, as `opd check` forecasts them, and measured

The package computes it (`memory.py`). Writes fits.json, fits-recipes.json, fits-check.json and fits-runs.json
below runs/bench.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from memory import CONTEXT, RANK, VOCABULARY, Run, config_of, peak
from side_by_side import bare_trainer, read_whole, record, reset_peak, resident, rounds, write_models

RESERVED = 1.5e9  # CUDA context, libraries, fragmentation: an assumption

SIZES = [24, 48, 80, 141]
PAIRS = [
    Run("0.6B", True, None),
    Run("0.6B", False, "8B"),
    Run("0.6B", False, "32B", teacher_bits=4),
    Run("1.7B", True, "32B", teacher_bits=8),
    Run("1.7B", False, "8B"),
    Run("1.7B", False, "8B", teacher_bits=8, adam=8),
    Run("4B", True, None),
    Run("4B", True, "32B", teacher_bits=4),
    Run("4B", False, "14B"),
    Run("4B", False, "32B", teacher_bits=4, adam=8),
    Run("8B", True, None),
    Run("8B", True, None, bits=4),
    Run("8B", True, "32B", teacher_bits=8),
    Run("8B", False, "14B", adam=8),
    Run("14B", True, None),
    Run("14B", True, "32B"),
    Run("32B", True, None, bits=4),
]


# of docs/recipes.md: whether an adapter trains, the base's bits, whether the teacher is another model of the same size,
# and the tokens of a teacher's prompt; 16 rollouts of 40 tokens, in micro-batches of 4
RECIPES = {
    "form, brief, SDFT": (True, 16, False, 125),
    "system prompt": (True, 16, False, 1050),
    "recover nf4": (True, 4, True, 40),
    "recover pruned": (False, 16, True, 40),
}
QWEN3 = ["0.6B", "1.7B", "4B", "8B", "14B", "32B"]
# bytes a second of memory, and operations a second in bf16 without sparsity, by their data sheets: RTX 4090, H100 SXM
CARDS = {24: (1.008e12, 165e12), 80: (3.35e12, 989e12)}


def largest(lora: bool, bits: int, another: bool, prompt: int, room: float) -> tuple[str, float] | None:
    """Returns the largest Qwen3 whose step with a recipe's settings fits, and its peak in GB; None if none does."""
    for size in reversed(QWEN3):
        needed, _, _ = peak(Run(size, lora, size if another else None, bits=bits, rows=16, micro=4), prompt, 40)
        if needed <= room:
            return size, round(needed / 1e9, 1)
    return None


def least_time(size: str, lora: bool, bits: int, another: bool, prompt: int, card: int) -> float:
    """Computes the seconds that an update takes at least: what is read and multiplied, at the rates of a data sheet.

    Each of 40 decoding steps reads all weights; a pass takes 2 operations per weight and token, a backward pass 2 for
    the gradients of activations and 2 for those of weights that train, and checkpointing goes forward once more.
    """
    weights, (bandwidth, rate) = 1e9 * float(size.removesuffix("B")), CARDS[card]
    rows, horizon, question = 16, 40, 40
    rollout = horizon * weights * bits / 8 / bandwidth
    teacher = 2 * weights * rows * (prompt + horizon) / rate
    student = (6 if lora else 8) * weights * rows * (question + horizon) / rate
    return rollout + teacher + student


def longest(run: Run, room: float) -> dict[str, Any]:
    """Tokens of prompt and completion, a quarter of them prompt; 0: not even 64."""

    def needs(length: int) -> tuple[float, str, str]:
        return peak(run, length // 4, length - length // 4)

    fits, beyond = 0, CONTEXT // 64 + 1
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if needs(64 * middle)[0] <= room else (fits, middle)
    size, phase, term = needs(64 * max(fits, 1))
    return {"tokens": 64 * fits, "gb": size / 1e9, "phase": phase, "term": term}


# -- the check ----------------------------------------------------------------------------------------------------

SMALL = Run("student", False, "teacher", teacher_bits=32, micro=8, checkpointing=False, mixed=False, cpu=True)
CHECKS: dict[str, tuple[Run, int, int]] = {
    "lora": (Run("0.6B", True, None, rows=2, micro=2, checkpointing=False, cpu=True), 32, 64),
    "lora, recomputed": (Run("0.6B", True, None, rows=2, micro=2, cpu=True), 32, 64),
    "full": (SMALL, 32, 128),
    "full, longer": (SMALL, 32, 512),
    "full, recomputed": (replace(SMALL, checkpointing=True), 32, 128),
    "full, longer, recomputed": (replace(SMALL, checkpointing=True), 32, 512),
    "full, longer, recomputed, bf16": (replace(SMALL, checkpointing=True, mixed=True), 32, 512),
    # written down before any of them was run, when the formula was done
    "unseen 1": (Run("0.6B", True, None, rows=4, micro=4, checkpointing=False, cpu=True), 64, 48),
    "unseen 2": (Run("0.6B", True, "student", teacher_bits=32, rows=4, micro=2, cpu=True), 16, 96),
    "unseen 3": (replace(SMALL, student="teacher", teacher="student"), 64, 96),
    "unseen 4": (replace(SMALL, student="teacher", teacher="student", rows=4, micro=4, checkpointing=True), 128, 384),
    "unseen 5": (replace(SMALL, micro=2), 48, 200),
    "unseen 6": (replace(SMALL, rows=16, micro=16, mixed=True), 16, 64),
    "unseen 7": (replace(SMALL, rows=2, micro=1, checkpointing=True), 500, 60),
    "unseen 8": (replace(SMALL, teacher="student", rows=12, micro=4), 96, 160),
    # instead of 1 and 2, which take hours where a CPU has no instructions for bf16; written down before they ran, but
    # for their bits, which were 16 by default until the first of them had run
    "unseen 9": (replace(SMALL, lora=True, bits=32, rows=6, micro=3), 200, 120),
    "unseen 10": (replace(SMALL, lora=True, bits=32, teacher=None, rows=10, micro=5, checkpointing=True), 60, 300),
}


def measure(run: Run, prompt: int, completion: int) -> dict[str, float]:
    """Two updates in this process; the most resident memory since before the first, less all but the weights."""
    import lightning as L
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from opd_lightning.data import PromptData
    from opd_lightning.evaluation_settings import Evaluation
    from opd_lightning.modalities.text import TextDistillation
    from opd_lightning.objective import Objective, ReverseKL, Term
    from opd_lightning.pretrained import Lora, Pretrained
    from opd_lightning.rollout_settings import Rollout
    from opd_lightning.teacher import Frozen, Initial, Teacher

    class Watch(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
            models = {policy.model for policy in module.policies.values()}
            read_whole(*models)
            self.weights = sum(w.nbytes for model in models for w in model.parameters())
            reset_peak()
            self.before = resident("VmRSS")

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), VOCABULARY)
        path = Path(folder) / run.student
        if not path.exists():
            Qwen3ForCausalLM._from_config(config_of(run.student), dtype=torch.bfloat16).save_pretrained(path)
            AutoTokenizer.from_pretrained(Path(folder) / "student").save_pretrained(path)
        source = Path(folder) / "prompts.jsonl"
        draw = torch.randint(2, VOCABULARY, (2 * run.rows, prompt), generator=torch.Generator().manual_seed(0))
        source.write_text(
            "".join(json.dumps({"prompt": " ".join(f"t{i}" for i in row)}) + "\n" for row in draw.tolist()),
            encoding="utf-8",
        )
        student = Pretrained(
            str(path), lora=Lora(r=RANK) if run.lora else None, gradient_checkpointing=run.checkpointing
        )
        teacher = Initial() if run.teacher is None else Frozen(Pretrained(str(Path(folder) / run.teacher)))
        module = TextDistillation(
            student=student,
            teachers={"teacher": Teacher(teacher)},
            objective=Objective([Term(ReverseKL())]),
            rollout=Rollout(batch_size=run.rows, horizon=completion),
            evaluation=Evaluation(before=False),
            pass_tokens=CONTEXT,  # one pass, as on a GPU
        )
        trainer = bare_trainer(2, folder, watch, precision="bf16-mixed" if run.mixed else "32-true")
        trainer.fit(module, PromptData(train=str(source)))
    return {"gb": (resident("VmHWM") - watch.before + watch.weights) / 1e9, "weights_gb": watch.weights / 1e9}


# -- the forecast of opd check --------------------------------------------------------------------------------------

RUNS: dict[str, list[str]] = {
    "images": ["-c", "opd:vision_language/quickstart.yaml", "--model.rollout.batch_size=256"],
    "GUI grounding": ["-c", "opd:gui_grounding/quickstart.yaml"],
    "diffusion": ["-c", "opd:diffusion/quickstart.yaml"],
}
HELD = ("weights", "teacher", "encoders")


def measure_run(arguments: list[str]) -> dict[str, Any]:
    """Two updates of a configured run, and what `opd check` forecasts for it; as in `measure`."""
    import lightning as L

    from opd_lightning.cli import OPDCLI
    from opd_lightning.forecast import peak as largest

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
            if trainer.global_step == 0:
                read_whole(*{policy.model for policy in module.policies.values()})
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # what checks left free would serve small tensors unseen
                reset_peak()
                self.before = resident("VmRSS")

        def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
            self.most = resident("VmHWM")
            self.phases = module.forecast(trainer, None).phases()

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        quick = ["--trainer.max_steps=2", "--model.evaluation.before=false", "--trainer.limit_val_batches=0"]
        OPDCLI(["fit", *arguments, *quick, f"--trainer.default_root_dir={folder}"], [watch])
    held = sum(watch.phases["update"].get(name, 0.0) for name in HELD)
    size, phase, term = largest(watch.phases)
    phases = {name: {t: round(v / 1e6, 1) for t, v in terms.items()} for name, terms in watch.phases.items()}
    found = (watch.most - watch.before + held) / 1e9
    return {
        "gb": found,
        "weights_gb": held / 1e9,
        "predicted_gb": size / 1e9,
        "phase": phase,
        "term": term,
        "mb": phases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--recipes", action="store_true", help="what the recipes fit on instead")
    parser.add_argument("--check", nargs="*", choices=CHECKS, help="which; none named: all")
    parser.add_argument("--case", choices=CHECKS, help="measure one here, and print JSON")
    parser.add_argument("--runs", nargs="*", choices=RUNS, help="which; none named: all")
    parser.add_argument("--run", choices=RUNS, help="measure one here, and print JSON")
    args = parser.parse_args()
    if args.run is not None:
        print(json.dumps(measure_run(RUNS[args.run])))
        return
    if args.runs is not None:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
        results = {}
        for name in args.runs or RUNS:
            (results[name],) = rounds({name: [sys.executable, __file__, "--run", name]}, 1)[name]
            print(name, results[name])
        record("fits-runs", {}, results)
        return
    if args.case is not None:
        print(json.dumps(measure(*CHECKS[args.case])))
        return
    if args.check is not None:
        # glibc keeps what is freed in small blocks; with this what is resident is what is alive
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
        results = {}
        for case in args.check or CHECKS:
            size, phase, term = peak(*CHECKS[case])
            (found,) = rounds({case: [sys.executable, __file__, "--case", case]}, 1)[case]
            results[case] = found | {"predicted_gb": size / 1e9, "phase": phase, "term": term}
            print(case, results[case])
        record("fits-check", {}, results)
        return
    if args.recipes:
        results = {}
        for name, recipe in RECIPES.items():
            results[name] = {}
            for card in CARDS:
                if (found := largest(*recipe, card * 1e9 - RESERVED)) is not None:
                    student, needed = found
                    seconds = round(least_time(student, *recipe, card), 2)
                    results[name][card] = {"student": student, "gb": needed, "seconds per update, at least": seconds}
            print(name, results[name])
        record("fits-recipes", {}, results)
        return
    table = {run.name: [longest(run, size * 1e9 - RESERVED) for size in SIZES] for run in PAIRS}
    record("fits", {"sizes": SIZES}, table)


if __name__ == "__main__":
    main()
