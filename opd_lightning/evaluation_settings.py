"""Evaluation: how the student acts on held-out prompts, and what is measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from .finite import Finite
from .rollout_settings import Rollout, check_sampling


@dataclass
class Evaluation:
    """How `validate`, `test` and `predict` let the student act.

    Args:
        samples: per prompt; with more than one, pass@k is reported beside the mean (k = samples).
        temperature: default 0, greedy; needs to be positive for several samples.
        top_p, top_k, min_p: filters, off by default (the rollout's do not apply here).
        horizon: default: the rollout's as it was configured, whatever callbacks turn it to.
        before: score the student (and the teachers, once) before the first training step.
        show: held-out prompts whose completions go to samples.jsonl at each validation.
        by: one or two columns; accuracy is also reported for each of their values, as ``accuracy/web/icon`` (with
            ``()|`` for ``[]/`` in a value), and `test` prints the table.

    Raises:
        ValueError: several greedy samples, which would be equal; a value out of range; more than two columns.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    horizon: int | None = None
    before: bool = True
    show: int = 3
    by: list[str] = field(default_factory=list)

    __setattr__ = Finite.__setattr__

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"evaluation.samples must be >= 1, got {self.samples}")
        check_sampling("evaluation", self)
        if len(self.by) > 2:
            raise ValueError(f"evaluation.by: a table has at most two columns to go by, got {self.by}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"evaluation.samples={self.samples} greedy samples would be equal; set evaluation.temperature"
            )

    def applied_to(self, rollout: Rollout, horizon: int | None = None) -> Rollout:
        """Overlays a rollout's settings with these; ``horizon`` goes before that of the settings."""
        return dataclasses.replace(
            rollout,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            horizon=horizon or self.horizon or rollout.horizon,
        )
