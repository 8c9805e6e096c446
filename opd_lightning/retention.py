"""Retention: how far the student has moved on prompts that have nothing to do with what it learns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import lightning as L
from torch import Tensor

from .callback import DistillationCallback
from .chat import problem_with_form
from .data_source import read_source
from .evaluation import BATCH_SIZE, EVALUATION_DRAWS
from .evaluation_settings import Evaluation
from .objective import CrossEntropy, ForwardKL
from .policy import Original
from .printable import quoted
from .progress import phase
from .rollout_settings import derived_seed
from .rows import LOCATION, BadRows, reason_of
from .teacher import Initial, Same, Teacher
from .trajectory import Example, Trajectories

BEFORE = "before_training"
"""Entry of ``model.teachers`` that ``evaluation.retention`` adds: the student before training."""


class Retention(DistillationCallback):
    """Measures what the student keeps: before the first step and at every validation.

    Logged are ``val/retention/kl``, KL(reference‖student) in nats, and ``val/retention/perplexity``, the student's, on
    given completions; in both all tokens of all completions count alike. Where rows have none the student writes them
    as in validation: the KL is that at the states which it visits, and ``val/retention/accuracy`` the mean of
    ``model.reward``. Every rank measures all rows, so they should be few.

    ``model.evaluation.retention: SOURCE`` adds it, with the student before training as its reference.

    Example::

        callbacks+:
          - {class_path: Retention, init_args: {data: "opd:assets/facts/unrelated.jsonl"}}

    Args:
        data: rows with the column ``prompt``, and ``completion`` in all or none, from a source as in `PromptData`.
        reference: an entry of ``model.teachers`` whose weights are the model that is to be kept, such as `Initial`, or
            the original of a student that was compressed. It reads the prompts as they are, not through its view.
        horizon: given completions are cut to as many tokens. Default 256.

    Raises:
        ValueError: horizon < 1; when the run begins: a setting without a vocabulary, no such teacher, data that can't
            be read, or a row that lacks what others have.
    """

    def __init__(self, data: str, reference: str = "teacher", horizon: int = 256) -> None:
        if horizon < 1:
            raise ValueError(f"Retention.horizon must be >= 1, got {horizon}")
        self.data, self.reference, self.horizon = data, reference, horizon
        self.asks = self.distributions = frozenset({reference})
        self.rows: list[Example] = []
        self._is_scored = False

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage in ("fit", "validate") and not self.rows:
            if "categorical" not in pl_module.provides:
                raise ValueError("Retention needs a vocabulary, which this setting lacks")
            key = "model.evaluation.retention" if self.reference == BEFORE else "Retention.data"
            columns = getattr(pl_module.reward, "columns", ())
            self.rows = read_rows(self.data, key, pl_module.refusal)
            self._is_scored = "completion" not in self.rows[0] and is_scored(self.rows, columns, key, pl_module)

    def measured(self, module: Any) -> dict[str, float]:
        """Returns the means by the name under which they are logged."""
        size = getattr(getattr(module.trainer, "datamodule", None), "validation_batch_size", BATCH_SIZE)
        values: dict[str, list[Tensor]] = {}
        with phase("measuring retention, rows", len(self.rows)) as at:
            for at.done in range(0, len(self.rows), size):
                for name, some in self._measured(module, at.done, self.rows[at.done : at.done + size]).items():
                    values.setdefault(name, []).append(some.double())
        sums = {name: sum(float(some.sum()) for some in batches) for name, batches in values.items()}
        counts = {name: sum(some.numel() for some in batches) for name, batches in values.items()}
        means = {name: sums[name] / counts[name] for name in values if counts[name]}
        if "surprise" in means:
            means["perplexity"] = math.exp(means.pop("surprise"))
        return {f"val/retention/{name}": mean for name, mean in means.items()}

    def _measured(self, module: Any, start: int, rows: list[Example]) -> dict[str, Tensor]:
        """Measures some rows, of which the first is the row ``start``: values that are averaged, by name."""
        seeds = [derived_seed(EVALUATION_DRAWS, 0, start + i) for i in range(len(rows))]
        if "completion" in rows[0]:
            given = module.act("dataset", rows, seeds, dataclasses.replace(module.rollout, horizon=self.horizon))
            surprise = module.reader.per_step(given, CrossEntropy())
            return {"kl": self._divergence(module, given), "surprise": surprise[given.mask]}
        rollout = module.evaluation.applied_to(module.rollout)
        acted = dataclasses.replace(module.actor, rollout=rollout, held_out=True).act("student", rows, seeds)
        values = {"kl": self._divergence(module, acted)}
        if self._is_scored:
            reward, _ = module.actor.checked_rewards(acted)
            values["accuracy"] = reward[~reward.isnan()]
        return values

    def _divergence(self, module: Any, trajectories: Trajectories) -> Tensor:
        divergence: Tensor = module.reader.per_step(trajectories, ForwardKL(), self.reference, Original())
        return divergence[trajectories.mask.cpu()]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step == 0 and pl_module.evaluation.before:
            values = self.measured(pl_module)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=0)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            pl_module.log_dict(self.measured(pl_module), sync_dist=True, reduce_fx="max")


def with_reference(evaluation: Evaluation, teachers: dict[str, Teacher]) -> dict[str, Teacher]:
    """Adds the student before training to the teachers, where ``evaluation.retention`` compares with it.

    Raises:
        ValueError: its name is taken.
    """
    if evaluation.retention is None:
        return teachers
    if BEFORE in teachers:
        raise ValueError(f"model.teachers: {BEFORE!r} is what evaluation.retention compares with; take another name")
    owner = next((name for name, teacher in teachers.items() if isinstance(teacher.weights, Initial)), None)
    return teachers | {BEFORE: Teacher(Initial() if owner is None else Same(owner))}


def retained(evaluation: Evaluation, trainer: Any) -> list[DistillationCallback]:
    """Makes the callback that ``evaluation.retention`` stands for; none without.

    Raises:
        ValueError: there is another one, which would log the same.
    """
    if evaluation.retention is None:
        return []
    if any(isinstance(callback, Retention) and callback.reference != BEFORE for callback in trainer.callbacks):
        raise ValueError(
            "model.evaluation.retention and the callback Retention are logged under the same names; remove one of them"
        )
    return [Retention(evaluation.retention, BEFORE)]


def read_rows(source: str, key: str, refusal: Callable[[Example], str | None]) -> list[Example]:
    """Reads rows with a prompt, all or none of which have a completion.

    Args:
        source: as in `PromptData`.
        key: the setting that holds it, for the messages.
        refusal: tells why no policy can act on a row; None: it can (`Setting.refusal`).

    Raises:
        ValueError: the source can't be read, or a row lacks a prompt, or a completion that others have, or can't be
            acted on; the message names the row.
    """
    rows: list[dict[str, Any]] = list(read_source(source, {}, key, 0, BadRows(key, "refuse")))
    given = any(row.get("completion") for row in rows)
    for row in rows:
        place, prompt = row.pop(LOCATION), row.get("prompt")
        problem = problem_with_form(prompt) if prompt else "prompt is missing"
        if given and not row.get("completion"):
            problem = problem or "completion is missing, which other rows have"
        try:
            problem = problem or refusal(row)
        except Exception as error:  # of a tokenizer, which may raise anything
            problem = reason_of(error)
        if problem:
            raise ValueError(f"{key}: {place}: {problem}; it measures given completions, or what the student writes")
        if not given:
            row.pop("completion", None)
    return rows


def is_scored(rows: list[Example], columns: tuple[str, ...], key: str, module: Any) -> bool:
    """Tells whether what the student writes to rows can be scored: they have the columns that the reward reads.

    Raises:
        ValueError: some have one of them, and others have not.
    """
    for column in columns:
        lacking = [i for i, row in enumerate(rows, 1) if row.get(column) is None]
        if lacking and len(lacking) < len(rows):
            raise ValueError(
                f"{key}: row {lacking[0]} has no {quoted(column)}, which model.reward reads, and other rows have one"
            )
        if lacking:
            return False
    return bool(module.has_rewards)
