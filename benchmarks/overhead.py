"""What Trainer and core cost beside the calls that they exist for: generating, forward passes, objective, backward
pass, clipping and update.

    python benchmarks/overhead.py [--updates 12]

One run of the small models (vocabulary 512, 32 × 128 tokens) whose bare calls are timed from outside: sampling, the
backbones of student and teacher, the objective's evaluation, the backward pass, the optimizer. What is left of the step
is overhead. The objective's own diagnostics are timed in the same run: steps that log against those that do not. Writes
runs/bench/overhead.json.
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
from side_by_side import FOLDER, bare_trainer, prompts, record, set_stop, write_models

from opd_lightning.data import PromptData
from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.modalities.autoregressive import DecodeLoop
from opd_lightning.modalities.text import TextDistillation
from opd_lightning.objective import Objective, ReverseKL, Term, loss_pass
from opd_lightning.objective.chunks import GradientsInside
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Frozen, Teacher

VOCABULARY = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--updates", type=int, default=12)
    args = parser.parse_args()
    models = FOLDER / f"models-{VOCABULARY}"
    write_models(models, VOCABULARY)
    spent: dict[str, float] = {}
    steps: list[dict[str, float]] = []

    def timed(name: str, function: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

        return call

    class Measured(TextDistillation):
        def configure_model(self) -> None:
            fresh = not self.policies
            super().configure_model()
            if fresh:
                for policy in self.policies.values():
                    set_stop(policy.model, 0.0)
                    policy.model.base_model.forward = timed("forward", policy.model.base_model.forward)

    class Watch(L.Callback):
        def on_before_backward(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_after_backward(self, *_: Any) -> None:
            spent["backward"] = time.perf_counter() - self.start

        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.optimizers[0].register_step_post_hook(self.updated)
            self.last = time.perf_counter()

        def on_before_optimizer_step(self, *_: Any) -> None:
            self.update = time.perf_counter()

        def updated(self, *_: Any) -> None:
            spent["update"] = time.perf_counter() - self.update

        def on_train_batch_end(self, *_: Any) -> None:
            now = time.perf_counter()
            steps.append({"step": now - self.last, **spent})
            spent.clear()
            self.last = time.perf_counter()

    write = timed("rollout", DecodeLoop.write)

    def sampled(engine: Any, policy: Any, *given: Any) -> Any:
        body = policy.model.base_model
        watched = vars(body).pop("forward")  # or the engine would leave the model to `generate`
        try:
            return write(engine, policy, *given)
        finally:
            body.forward = watched

    DecodeLoop.write = sampled
    loss_pass.chunk_diagnostics = timed("diagnostics", loss_pass.chunk_diagnostics)
    GradientsInside.forward = staticmethod(timed("objective", GradientsInside.forward))

    module = Measured(
        student=Pretrained(str(models / "student")),
        teachers={"teacher": Teacher(Frozen(Pretrained(str(models / "teacher"))))},
        objective=Objective([Term(ReverseKL())]),
        rollout=Rollout(batch_size=32, horizon=128),
        evaluation=Evaluation(before=False),
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "prompts.jsonl"
        rows = prompts(32 * args.updates, VOCABULARY)
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        trainer = bare_trainer(args.updates, folder, Watch(), gradient_clip_val=1.0, log_every_n_steps=10)
        trainer.fit(module, PromptData(train=str(source)))

    plain = [step for step in steps[1:] if "diagnostics" not in step]
    calls = ("rollout", "forward", "objective", "backward", "update")
    middle = {name: statistics.median(step[name] for step in plain) for name in ("step", *calls)}
    overhead = statistics.median(step["step"] - sum(step[name] for name in calls) for step in plain)
    logged = statistics.median(step["diagnostics"] for step in steps if "diagnostics" in step)
    results = middle | {
        "overhead": overhead,
        "overhead_share": overhead / middle["step"],
        "diagnostics_when_logged": logged,
        "diagnostics_share_when_logged": logged / middle["step"],
        "diagnostics_share_logging_every_10": logged / middle["step"] / 10,
        "steps": steps,
    }
    for name, value in results.items():
        if name != "steps":
            print(f"{name:36}{value:.1%}" if "share" in name else f"{name:36}{value:.3f} s")
    record("overhead", vars(args), results)


if __name__ == "__main__":
    main()
