"""What fits into a GPU's memory: the peak of one training step, computed phase by phase from the models' shapes.

    python benchmarks/fits.py            the table, computed
    python benchmarks/fits.py --check    training steps on this CPU, predicted and measured; Linux only

What bodies keep and need is counted (`counted.py`), the rest is arithmetic on the shapes. Writes runs/bench/fits.json
and fits-check.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from counted import CONTEXT, RANK, SHAPES, VOCABULARY, built, counts, passed
from side_by_side import bare_trainer, record, reset_peak, resident, rounds, write_models

CHUNK = 192 * 2**20  # the default of Objective.chunk_mib
# Per weight: int8 with a float32 scale per row is 1 byte; nf4 has a byte per 64 weights and double quantisation
BYTES = {32: 4.0, 16: 2.0, 8: 1.0, 4: 0.5 + 1 / 64 + 4 / (64 * 256)}
STATE = {32: 8.0, 8: 2 + 2 * 4 / 256}  # both moments of AdamW, per trained weight
RESERVED = 1.5e9  # CUDA context, libraries, fragmentation: an assumption


@dataclass(frozen=True)
class Run:
    """One configuration; ``teacher`` None is the student with its adapter switched off."""

    student: str
    lora: bool
    teacher: str | None
    bits: int = 16  # of a LoRA student's base; what is trained is float32
    teacher_bits: int = 16
    adam: int = 32
    rows: int = 8
    micro: int = 1
    checkpointing: bool = True
    mixed: bool = True  # trainer.precision: bf16-mixed, otherwise 32-true
    cpu: bool = False

    @property
    def name(self) -> str:
        how = f"LoRA{f' on {self.bits} bit' * (self.bits < 16)}" if self.lora else f"full, AdamW {self.adam} bit"
        teacher = "itself" if self.teacher is None else f"{self.teacher}, {self.teacher_bits} bit"
        return f"{self.student} {how} | {teacher}"


def body(run: Run, name: str, half: bool, lora: bool, train: bool, n: int) -> tuple[float, ...]:
    """`passed` for all layers; for the table along straight lines between a few passes."""
    settings, layers = (name, half, lora, run.mixed, run.checkpointing, train, run.rows > run.micro), SHAPES[name][2]
    if run.cpu:
        return passed(*settings, layers, n)
    grid = [1024, 8192, CONTEXT]
    few, more = (np.array([passed(*settings, some, tokens) for tokens in grid], float).T for some in (2, 4))
    return tuple(float(np.interp(n, grid, a + (b - a) / 2 * (layers - 2))) for a, b in zip(few, more, strict=True))


def phases(run: Run, prompt: int, completion: int) -> dict[str, dict[str, float]]:
    """What lives in each phase of a step, term by term, in bytes; the peak is the largest sum."""
    hidden, inner, layers, _, keys, size, _ = SHAPES[run.student]
    linear, largest, others, adapters = counts(run.student)
    trained = adapters if run.lora else linear + others
    head, tokens, states = VOCABULARY * hidden, run.micro * (prompt + completion), run.micro * completion
    wide, compute = (2 if run.lora else 4), (2 if run.mixed or run.lora else 4)  # of hidden states; of products
    held = {"weights": BYTES[run.bits] * linear + 2.0 * others + 4 * adapters if run.lora else 4.0 * trained}
    said = SHAPES[run.teacher or run.student]
    half, bits = run.teacher is None or run.teacher_bits < 32, run.teacher_bits if run.teacher else run.bits
    many, most, rest, _ = counts(run.teacher or run.student)
    if run.teacher:
        held["teacher"] = BYTES[bits] * many + BYTES[max(16, bits)] * rest
    held["optimiser"] = STATE[run.adam] * trained
    gradients = {"gradients": 4.0 * trained}
    before = gradients if run.rows > run.micro else {}  # those of micro-batches before

    # keys are as wide as the weights of their norm, values as the products
    cache = run.rows * layers * keys * size * (wide + compute)
    copies: dict[str, float] = {"logits": 3 * 4.0 * run.rows * VOCABULARY}
    if run.cpu or wide > compute:
        copies["copy of the head"] = compute * head
    if run.cpu and not run.lora:
        copies["copy of the layers"] = compute * linear
    # a 4-bit matrix is multiplied in bf16, an 8-bit one into int32
    unpacked = {4: 2.0 * most, 8: 4.0 * tokens * said[1]}.get(bits, 0.0)
    mine = {4: 2.0 * largest, 8: 4.0 * tokens * inner}.get(run.bits, 0.0) if run.lora else 0.0
    reading = body(run, run.student, run.lora, run.lora, False, run.rows * prompt)[1] + mine
    asked = body(run, run.teacher or run.student, half, False, False, tokens)[1] + unpacked
    kept, forward, backward = body(run, run.student, run.lora, run.lora, True, tokens)
    # cut out and flattened; the student's also have a float32 gradient, and that in their own type
    theirs = {"hidden states": 2.0 * states * said[0] * (2 if half else 4)}
    both = {"hidden states": theirs["hidden states"] + states * hidden * (3 * wide + 4)}
    chunk = {"chunk": min(CHUNK, states * VOCABULARY * 2.0 * (compute + 2))}
    slope = {} if run.lora else {"gradient of the head": 4.0 * head}
    return {
        "reading": held | {"cache": 1.0 * cache * prompt, "pass": reading},
        "writing": held | {"cache": cache * (2.0 * prompt + completion)} | copies,
        "teacher": held | before | {"pass": asked},
        "student": held | before | theirs | {"activations": forward + mine},
        "objective": held | before | both | {"activations": kept} | chunk | slope,
        "backward": held | before | {"activations": backward + mine} | slope,
        "update": held | gradients,
    }


def peak(run: Run, prompt: int, completion: int) -> tuple[float, str, str]:
    """Bytes, the phase, and its largest term."""
    found = phases(run, prompt, completion)
    worst = max(found, key=lambda phase: sum(found[phase].values()))
    return sum(found[worst].values()), worst, max(found[worst], key=lambda term: found[worst][term])


# -- the table ----------------------------------------------------------------------------------------------------

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
}


def measure(run: Run, prompt: int, completion: int) -> dict[str, float]:
    """Two updates in this process; the most resident memory since before the first, less all but the weights."""
    import lightning as L
    from transformers import AutoTokenizer

    from opd_lightning.data import PromptData
    from opd_lightning.evaluation import Evaluation
    from opd_lightning.modalities.text import TextDistillation
    from opd_lightning.objective import Objective, ReverseKL, Term
    from opd_lightning.pretrained import Lora, Pretrained
    from opd_lightning.rollout import Rollout
    from opd_lightning.teacher import Frozen, Initial, Teacher

    class Watch(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
            models = {policy.model for policy in module.policies.values()}
            for weight in [weight for model in models for weight in model.parameters()]:
                weight.detach().sum()  # mapped from its file, it is resident from now on
            self.weights = sum(w.nbytes for model in models for w in model.parameters())
            reset_peak()
            self.before = resident("VmRSS")

    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), VOCABULARY)
        path = Path(folder) / run.student
        if not path.exists():
            made = built(run.student, torch.bfloat16, False)
            type(made)._from_config(made.config, dtype=torch.bfloat16).save_pretrained(path)
            AutoTokenizer.from_pretrained(Path(folder) / "student").save_pretrained(path)
        source = Path(folder) / "prompts.jsonl"
        draw = torch.randint(2, VOCABULARY, (2 * run.rows, prompt), generator=torch.Generator().manual_seed(0))
        source.write_text(
            "".join(json.dumps({"prompt": " ".join(f"t{i}" for i in row)}) + "\n" for row in draw.tolist())
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
        )
        trainer = bare_trainer(2, folder, watch, precision="bf16-mixed" if run.mixed else "32-true")
        trainer.fit(module, PromptData(train=str(source)))
    return {"gb": (resident("VmHWM") - watch.before + watch.weights) / 1e9, "weights_gb": watch.weights / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--check", nargs="*", choices=CHECKS, help="which; none named: all")
    parser.add_argument("--case", choices=CHECKS, help="measure one here, and print JSON")
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measure(*CHECKS[args.case])))
        return
    if args.check is not None:
        results = {}
        for case in args.check or CHECKS:
            size, phase, term = peak(*CHECKS[case])
            (found,) = rounds({case: [sys.executable, __file__, "--case", case]}, 1)[case]
            results[case] = found | {"predicted_gb": size / 1e9, "phase": phase, "term": term}
            print(case, results[case])
        record("fits-check", {}, results)
        return
    table = {run.name: [longest(run, size * 1e9 - RESERVED) for size in SIZES] for run in PAIRS}
    record("fits", {"sizes": SIZES}, table)


if __name__ == "__main__":
    main()
