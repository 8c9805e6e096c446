"""CollapseAlarm: tells of a run that goes wrong, with advice, or ends it."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor

from ..callback import DistillationCallback
from ..folder import ALARMS
from ..module import OnPolicyDistillation
from ..optimizer_step import OptimizerStep

LAST = 10_000
REPETITION = "repetition"


@dataclass(frozen=True)
class Sign:
    """Sign of a collapse.

    Attributes:
        name: the alarm's argument for its limit.
        reads: the end of the name of what is recorded.
        is_bad: of the value, what it is compared with, and the limit.
        advice: what the sheets of those who met it did about it.
    """

    name: str
    reads: str
    is_bad: Callable[[float, float, float], bool]
    advice: str


SIGNS = (
    Sign(
        "entropy",
        "student_entropy",
        lambda value, start, limit: start > 0 and value < limit * start,
        "prompts may be too much alike: mix in others (2604.13016); if the term's support is the student's top k, its "
        "tail must count (a truncated KL(student‖teacher) collapses: 2605.11182)",
    ),
    Sign(
        "length",
        "length",
        lambda value, start, limit: value > limit * start,
        "long repetitive rollouts earn the best reverse-KL advantage: add a KL to the student before training and "
        "completions of the dataset (StableOPD, 2604.08527), or stop rollouts early (EarlyStopRollout)",
    ),
    Sign(
        "truncated",
        "stopped",
        lambda value, start, limit: value < start - limit,
        "rollouts no longer end by themselves: check that the stop token is trained and shared with the teacher; add a "
        "KL to the student before training and completions of the dataset (StableOPD, 2604.08527)",
    ),
    Sign(
        REPETITION,
        REPETITION,
        lambda value, start, limit: value > limit,
        "add a KL to the student before training and completions of the dataset (StableOPD, 2604.08527)",
    ),
    Sign(
        "first_step_kl",
        "/kl_first_step",
        lambda value, start, limit: value > limit,
        "the two disagree before the first step is taken: compare their templates, thinking modes and stop tokens",
    ),
    Sign(
        "overlap",
        "/overlap_mass",
        lambda value, start, limit: value < limit * start,
        "student and teacher no longer consider the same steps, where the gradient lives: start from a student that "
        "was fine-tuned on the teacher's rollouts, or take one whose thinking is more alike (2604.13016)",
    ),
)


class CollapseAlarm(DistillationCallback):
    """Watches what is logged, and how much rollouts repeat themselves.

    It looks at the optimizer steps that are logged (``trainer.log_every_n_steps``); "at first" is the mean of the first
    ``baseline`` looks. What has been wrong for ``patience`` looks on end is told once, with advice, and again only
    after it was well in between. Loss terms that are no longer finite are told at once. What was told is in
    ``alarms.jsonl`` in the run's folder, for `opd report`. Overlap is known for
    distributions over a vocabulary; the entropy of a density may be negative, of which there is no share. Logged:
    ``train/repetition`` and ``train/alarms``, how many things are wrong.

    The limits are ours; None turns one off. Which rollout repeats itself is StableOPD's rule (2604.08527). A horizon
    that a curriculum raises looks like length inflation.

    Example::

        callbacks+:
          - class_path: CollapseAlarm
            init_args: {action: stop, length: 3.0}

    Args:
        action: ``warn``, or ``stop``: write ``collapse.ckpt`` into the run's folder and end the run.
        entropy: of the student, as a share of what it was at first, or of a teacher's now if that is less. Default 0.2.
        length: times what it was at first. Default 2.
        truncated: rise of the share of rollouts that reach the horizon. Default 0.5.
        repetition: share of rollouts whose last 10 000 steps zlib makes more than ``compression`` times smaller.
            Default 0.1, ours: StableOPD watches this share and sets it no limit.
        compression: default 10 (StableOPD, 2604.08527, of the last 10 000 characters).
        first_step_kl: KL(student‖teacher) at the first step, in nats. Default 5.
        overlap: the student's mass on what both count among their likeliest steps, as a share of what it was at first.
            Default 0.5.
        patience: default 3.
        baseline: default 3.

    Raises:
        ValueError: a value out of range.
    """

    remembers = ("first", "wrong")

    def __init__(
        self,
        action: Literal["warn", "stop"] = "warn",
        entropy: float | None = 0.2,
        length: float | None = 2.0,
        truncated: float | None = 0.5,
        repetition: float | None = 0.1,
        compression: float = 10.0,
        first_step_kl: float | None = 5.0,
        overlap: float | None = 0.5,
        patience: int = 3,
        baseline: int = 3,
    ) -> None:
        if action not in ("warn", "stop"):
            raise ValueError(f"CollapseAlarm.action is warn or stop, not {action!r}")
        if min(patience, baseline) < 1 or compression <= 1:
            raise ValueError(
                f"CollapseAlarm: patience={patience} and baseline={baseline} must be >= 1, and "
                f"compression={compression} > 1"
            )
        self.action, self.compression, self.patience, self.baseline = action, compression, patience, baseline
        self.limits = {
            "entropy": entropy,
            "length": length,
            "truncated": truncated,
            REPETITION: repetition,
            "first_step_kl": first_step_kl,
            "overlap": overlap,
        }
        self.first: dict[str, list[float]] = {}
        self.wrong: dict[str, int] = {}  # looks on end
        self.reason: str | None = None

    def on_optimizer_step_end(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        if not module.is_logged(module.global_step):
            return
        if self.limits[REPETITION] is not None:
            module.record(REPETITION, self._repeating(step))
        messages = self._test(module.recorded())
        module.record("alarms", float(sum(looks >= self.patience for looks in self.wrong.values())))
        for message in messages:
            rank_zero_warn(f"optimizer step {module.global_step}: {message}")
            _note(module.folder / ALARMS, {"step": module.global_step, "message": message})
        if messages and self.action == "stop":
            self.reason, module.trainer.should_stop = messages[0], True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.reason is not None:
            path = f"{trainer.default_root_dir}/collapse.ckpt"
            trainer.save_checkpoint(path)
            rank_zero_info(f"CollapseAlarm: stopped after optimizer step {trainer.global_step}, saved as {path}")

    def _test(self, values: dict[str, float]) -> list[str]:
        """Compares what was recorded with the limits, and returns the messages that are due now."""
        warnings: dict[str, str] = {}
        for name, value in values.items():
            if name.startswith("loss/") and not math.isfinite(value):
                warnings[name] = f"{name} is {value}: lower the learning rate, clip gradients, or train in float32"
                # at once: the count below makes it `patience`
                self.wrong[name] = max(self.wrong.get(name, 0), self.patience - 1)
            for sign in SIGNS:
                limit = self.limits[sign.name]
                if limit is None or not (name == sign.reads or (sign.reads[0] == "/" and name.endswith(sign.reads))):
                    continue
                first = self.first.setdefault(name, [])
                if len(first) < self.baseline:
                    first.append(value)
                start = fmean(first)
                if sign.name == "entropy":  # a student of a sure teacher shall become sure
                    start = min([start, *(other for teacher, other in values.items() if teacher.endswith("/entropy"))])
                if sign.is_bad(value, start, limit):
                    warnings[f"{sign.name} {name}"] = f"train/{name} is {value:.3g}, against {start:.3g}: {sign.advice}"
        self.wrong = {key: self.wrong.get(key, 0) + 1 for key in warnings}
        return [message for key, message in warnings.items() if self.wrong[key] == self.patience]

    def _repeating(self, step: OptimizerStep) -> Tensor:
        """Marks trajectories that repeat themselves, ``[B]``, 1 or 0."""
        return torch.tensor(
            [
                float(compressibility(actions[mask][-LAST:]) > self.compression)
                for trajectories in step.trajectories
                for actions, mask in zip(trajectories.actions.cpu(), trajectories.mask.cpu(), strict=True)
            ]
        )


@rank_zero_only
def _note(path: Path, alarm: dict[str, Any]) -> None:
    """Adds an alarm to those that the run's report shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(alarm) + "\n")


def compressibility(actions: Tensor) -> float:
    """Computes the factor by which zlib compresses ``actions [n, …]``, numbered by kind, two bytes each."""
    if not len(actions):
        return 1.0
    kinds = np.unique(actions.float().numpy(), axis=0, return_inverse=True)[1]
    written = kinds.astype(np.uint16).tobytes()
    return len(written) / len(zlib.compress(written))
