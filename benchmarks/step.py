"""A whole optimizer step beside TRL's `DistillationTrainer`: same models, prompts, lengths, divergence, optimizer.

    python benchmarks/step.py [--case small-equal …] [--rounds 3] [--updates 6]

Random Qwen3 models whose stop token has a given probability (0: every completion has the full length; otherwise lengths
are geometric, cut at the maximum, with a mean of half of it, drawn by each side for itself). Reverse KL over the full
vocabulary at temperature 1 (TRL's default), AdamW, clipping at 1. A step's time is the median over the updates after
the first; memory is the kernel's high-water mark of the resident set less what was resident, models included, before
training. Linux only. Writes runs/bench/step-<case>.json.

The cases "smollm2" take SmolLM2-135M-Instruct (`opd fetch smollm2`), which stops by itself. In "smollm2-context" a LoRA
is taught by the model without it, which sees 1,000 tokens before each question; TRL has no teachers with a prompt of
their own, so the peer is ours with those tokens read again in every row.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from side_by_side import (
    FOLDER,
    MB,
    PEER_PYTHON,
    bare_trainer,
    medians,
    prompts,
    read_whole,
    record,
    reset_peak,
    resident,
    rounds,
    set_stop,
    share_of,
    write_models,
)

SMOLLM2_FOLDER = Path("models/smollm2/unpacked")
HALF = 0.0126  # stop probability with which lengths cut at 128 have a mean of 64
RANDOM = {"vocabulary": 512, "batch": 32, "horizon": 128, "stop": 0.0, "bf16": False, "updates": 8, "peer": "trl"}
LARGE = RANDOM | {"vocabulary": 151_936, "batch": 8, "updates": 4}
SMOLLM2 = RANDOM | {"vocabulary": None, "batch": 16, "horizon": 64, "stop": None, "updates": 4}
CASES: dict[str, dict[str, Any]] = {
    "small-equal": RANDOM,
    "small-ragged": RANDOM | {"stop": HALF},
    "large-equal": LARGE,
    "large-ragged": LARGE | {"stop": HALF},
    "large-bf16": LARGE | {"bf16": True},
    "smollm2": SMOLLM2,
    "smollm2-bf16": SMOLLM2 | {"bf16": True},
    "smollm2-context": SMOLLM2 | {"context": 1000, "peer": "whole rows"},
}


def prepare(case: dict[str, Any]) -> None:
    """Makes the models of a case, unless they are there."""
    if case["vocabulary"] is not None:
        write_models(models_of(case)["student"].parent, case["vocabulary"])
    elif not SMOLLM2_FOLDER.exists():
        from opd_lightning.fetch import fetch, unpack

        unpack(fetch("smollm2", SMOLLM2_FOLDER.parent), SMOLLM2_FOLDER)


def models_of(case: dict[str, Any]) -> dict[str, Path]:
    random = FOLDER / f"models-{case['vocabulary']}"
    return {name: SMOLLM2_FOLDER if case["vocabulary"] is None else random / name for name in ("student", "teacher")}


def rows_of(case: dict[str, Any], updates: int) -> list[dict[str, Any]]:
    """Random tokens, or questions of 5 to 15 tokens."""
    count = case["batch"] * updates
    if case["vocabulary"] is not None:
        return prompts(count, case["vocabulary"])
    return [{"prompt": [{"role": "user", "content": question(i)}]} for i in range(count)]


def question(i: int) -> str:
    things = (
        "rivers",
        "bread",
        "the moon",
        "bees",
        "clocks",
        "volcanoes",
        "chess",
        "rain",
        "glass",
        "maps and compasses",
    )
    asks = ("What are {}?", "Tell me something about {}.", "Why do people like {} so much?", "Write one line on {}.")
    return asks[i % len(asks)].format(things[i * 7 % len(things)]) + f" ({i})"


def context_of(case: dict[str, Any]) -> str:
    """Returns demonstrations of so many tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2_FOLDER)
    shown = "\n".join(f"Question: {question(i)}\nAnswer: {i} things are known of it." for i in range(100))
    return tokenizer.decode(tokenizer(shown)["input_ids"][: case["context"]])


class Clock:
    """Seconds per phase and per step; phases of the first step are dropped with it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.ends: list[float] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        if self.ends:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return timed

    def step_ends(self) -> None:
        if not self.ends:
            self.cpu = time.process_time()
        self.ends.append(time.perf_counter())

    def result(self, tokens: int, loss: float, before: int) -> dict[str, Any]:
        steps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        total = sum(steps)
        phases = {name: seconds / len(steps) for name, seconds in self.seconds.items()}
        return {
            "seconds": statistics.median(steps),
            "cpu_seconds": (time.process_time() - self.cpu) / len(steps),
            "mean_seconds": total / len(steps),
            "tokens_per_step": tokens / len(steps),
            "loss": loss,
            "peak_mb": (resident("VmHWM") - before) / MB,
            "before_mb": before / MB,
            "phases": phases | {"rest": total / len(steps) - sum(phases.values())},
        }


def ours(case: dict[str, Any], updates: int) -> dict[str, Any]:
    import lightning as L

    from opd_lightning.data import PromptData
    from opd_lightning.evaluation_settings import Evaluation
    from opd_lightning.modalities.autoregressive import PromptView
    from opd_lightning.modalities.text import TextDistillation
    from opd_lightning.objective import Objective, ReverseKL, Term
    from opd_lightning.pretrained import Lora, Pretrained
    from opd_lightning.rollout_settings import Rollout
    from opd_lightning.teacher import Frozen, Initial, Teacher

    clock = Clock()

    class Measured(TextDistillation):
        def configure_model(self) -> None:
            fresh = not self.policies
            super().configure_model()
            if fresh and case["stop"] is not None:
                for policy in self.policies.values():
                    set_stop(policy.model, case["stop"])

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            clock.add("update", time.perf_counter() - watch.update)

    class Watch(L.Callback):
        tokens, losses, before = 0, [], 0

        def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
            read_whole(*(policy.model for policy in module.policies.values()))
            reset_peak()
            self.before = resident("VmRSS")

        def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
            module.metrics.stopwatch.phase = clock.phase

        def on_before_optimizer_step(self, *_: Any) -> None:
            self.update = time.perf_counter()

        def on_before_backward(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_after_backward(self, *_: Any) -> None:
            clock.add("backward", time.perf_counter() - self.start)

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            if clock.ends:
                self.tokens += int(batch.trajectories.mask.sum())
            self.losses.append(float(outputs["loss"]))
            clock.step_ends()

    watch, models = Watch(), models_of(case)
    lora, teacher = None, Teacher(Frozen(Pretrained(str(models["teacher"]))))
    if "context" in case:
        shown = [{"role": "system", "content": context_of(case)}, {"role": "user", "content": "{{ prompt }}"}]
        lora, teacher = Lora(r=16), Teacher(Initial(), PromptView(shown))
    module = Measured(
        student=Pretrained(str(models["student"]), lora=lora),
        teachers={"teacher": teacher},
        objective=Objective([Term(ReverseKL())]),
        rollout=Rollout(batch_size=case["batch"], horizon=case["horizon"]),
        evaluation=Evaluation(before=False),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
    )
    rows = rows_of(case, updates)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "prompts.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        precision = "bf16-mixed" if case["bf16"] else "32-true"
        trainer = bare_trainer(updates, folder, watch, precision=precision, gradient_clip_val=1.0, log_every_n_steps=10)
        trainer.fit(module, PromptData(train=str(source)))
    return clock.result(watch.tokens, statistics.mean(watch.losses), watch.before)


def whole_rows(case: dict[str, Any], updates: int) -> dict[str, Any]:
    """Ours, but for prefixes that rows share, which are read in every row."""
    from opd_lightning.modalities.autoregressive import reading

    reading.shares_prefixes = lambda *_: False
    return ours(case, updates)


def trl(case: dict[str, Any], updates: int) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    clock = Clock()

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.update = time.perf_counter()

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            clock.add("update", time.perf_counter() - self.update)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.step_ends()

    models = models_of(case)
    student, teacher = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in models.values())
    for model in (student, teacher) if case["stop"] is not None else ():
        set_stop(model, case["stop"])
    tokens, losses = 0, []
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher.eval().requires_grad_(False),
            args=DistillationConfig(
                output_dir=folder,
                per_device_train_batch_size=case["batch"],
                max_completion_length=case["horizon"],
                max_steps=updates,
                beta=1.0,
                learning_rate=1e-6,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=1.0,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                gradient_checkpointing=False,
                bf16=case["bf16"],
                use_cpu=True,
            ),
            train_dataset=Dataset.from_list(rows_of(case, updates)),
            processing_class=AutoTokenizer.from_pretrained(models["student"], padding_side="left"),
            callbacks=[Watch()],
        )
        generate, loss, hidden = (
            trainer._generate_and_score_completions,
            trainer._compute_loss,
            trainer._get_last_hidden_state,
        )

        def counted(inputs: Any) -> Any:
            nonlocal tokens
            made = clock.around("rollout", generate)(inputs)
            if clock.ends:
                tokens += int(made["completion_mask"].sum())
            return made

        def valued(*args: Any) -> Any:
            inside = sum(clock.seconds.get(name, 0.0) for name in ("student", "teacher"))
            start = time.perf_counter()
            value = loss(*args)
            inside = sum(clock.seconds.get(name, 0.0) for name in ("student", "teacher")) - inside
            clock.add("objective", time.perf_counter() - start - inside)
            losses.append(float(value[0]))
            return value

        def asked(model: Any, *args: Any, **kwargs: Any) -> Any:
            return clock.around("student" if torch.is_grad_enabled() else "teacher", hidden)(model, *args, **kwargs)

        trainer._generate_and_score_completions, trainer._compute_loss = counted, valued
        trainer._get_last_hidden_state = asked
        trainer.accelerator.backward = clock.around("backward", trainer.accelerator.backward)
        read_whole(student, teacher)
        reset_peak()
        before = resident("VmRSS")
        trainer.train()
    return clock.result(tokens, statistics.mean(losses), before)


SIDES: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {"ours": ours, "trl": trl, "whole rows": whole_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, help="default: 8 of small models, 4 of others")
    parser.add_argument("--side", choices=list(SIDES), help="measure one side here, and print JSON")
    args = parser.parse_args()
    if args.side is not None:
        (name,) = args.case
        print(json.dumps(SIDES[args.side](CASES[name], args.updates)))
        return

    for name in args.case:
        case = CASES[name]
        prepare(case)
        updates, peer = args.updates or case["updates"], case["peer"]
        command = [__file__, "--case", name, "--updates", str(updates), "--side"]
        python = {"ours": sys.executable, peer: str(PEER_PYTHON) if peer == "trl" else sys.executable}
        runs = rounds({side: [python[side], *command, side] for side in python}, args.rounds)
        middle = {side: medians(measured) for side, measured in runs.items()}
        mine, theirs = middle["ours"], middle[peer]
        ratios = {what: mine[what] / theirs[what] for what in ("seconds", "cpu_seconds", "peak_mb")}
        per_token = ratios["seconds"] * theirs["tokens_per_step"] / mine["tokens_per_step"]
        results = middle | {"ratios": ratios | {"seconds_per_token": per_token}, "runs": runs}
        print(
            f"{name}: time {ratios['seconds']:.2f} ({per_token:.2f} per token), CPU time {ratios['cpu_seconds']:.2f}, "
            f"peak {ratios['peak_mb']:.2f}"
        )
        for side, found in middle.items():
            print(
                f"  {side:11}{found['seconds']:7.2f} s  {found['tokens_per_step']:6.0f} tokens  "
                f"{found['peak_mb']:6.0f} MB above {found['before_mb']:.0f}  loss {found['loss']:.5f}  "
                f"{share_of(found['phases'], found['mean_seconds'])}"
            )
        record(f"step-{name}", {"rounds": args.rounds, **case, "updates": updates}, results)


if __name__ == "__main__":
    main()
