"""Retention: how far the student has moved on texts that have nothing to do with what it learns."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import lightning as L
from torch import Tensor

from ..callback import DistillationCallback
from ..chat import problem_with_form
from ..data_source import read_source
from ..module import OnPolicyDistillation
from ..objective import CrossEntropy, ForwardKL
from ..policy import Original
from ..rows import LOCATION, BadRows
from ..trajectory import Example


class Retention(DistillationCallback):
    """Measures what the student keeps, on given completions: before the first step and at every validation.

    Logged are ``val/retention/kl``, KL(reference‖student) in nats, and ``val/retention/perplexity``, the student's; in
    both all tokens of all completions count alike. Every rank measures all rows, so the texts should be few.

    Example::

        callbacks+:
          - {class_path: Retention, init_args: {data: "opd:assets/facts/unrelated.jsonl"}}

    Args:
        data: rows with the columns ``prompt`` and ``completion``, from a source as in `PromptData`.
        reference: an entry of ``model.teachers`` whose weights are the model that is to be kept, such as `Initial`, or
            the original of a student that was compressed. It reads the prompts as they are, not through its view.
        horizon: completions are cut to as many tokens. Default 256.

    Raises:
        ValueError: horizon < 1; when the run begins: a setting without a vocabulary, no such teacher, data that can't
            be read or a row without one of the columns.
    """

    def __init__(self, data: str, reference: str = "teacher", horizon: int = 256) -> None:
        if horizon < 1:
            raise ValueError(f"Retention.horizon must be >= 1, got {horizon}")
        self.data, self.reference, self.horizon = data, reference, horizon
        self.asks = self.distributions = frozenset({reference})
        self.rows: list[Example] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage in ("fit", "validate") and not self.rows:
            assert isinstance(pl_module, OnPolicyDistillation)
            if "categorical" not in pl_module.provides:
                raise ValueError("Retention needs a vocabulary, which this setting lacks")
            self.rows = read_rows(self.data)

    def measured(self, module: OnPolicyDistillation) -> dict[str, float]:
        """Returns both means by the name under which they are logged."""
        rollout = dataclasses.replace(module.rollout, horizon=self.horizon)
        # seeds draw nothing: completions are given
        given = module.act("dataset", self.rows, list(range(len(self.rows))), rollout)
        divergence = module.reader.per_step(given, ForwardKL(), self.reference, Original())
        surprise = module.reader.per_step(given, CrossEntropy())

        def mean(values: Tensor) -> float:
            return float(values[given.mask].double().mean())

        return {"val/retention/kl": mean(divergence), "val/retention/perplexity": math.exp(mean(surprise))}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, OnPolicyDistillation)
        if trainer.global_step == 0 and pl_module.evaluation.before:
            values = self.measured(pl_module)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=0)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, OnPolicyDistillation)
        if not trainer.sanity_checking:
            pl_module.log_dict(self.measured(pl_module), sync_dist=True, reduce_fx="max")


def read_rows(source: str) -> list[Example]:
    """Reads rows with a prompt and a completion.

    Raises:
        ValueError: the source can't be read, or a row lacks one of the two; the message names the row.
    """
    rows: list[dict[str, Any]] = list(read_source(source, {}, "Retention.data", 0, BadRows("Retention.data", "refuse")))
    for row in rows:
        place, prompt = row.pop(LOCATION), row.get("prompt")
        problem = problem_with_form(prompt) if prompt else "prompt is missing"
        if problem := problem or (None if row.get("completion") else "completion is missing"):
            raise ValueError(f"Retention.data: {place}: {problem}; it measures completions of prompts")
    return rows
