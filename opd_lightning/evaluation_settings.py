"""Evaluation: how the student acts on held-out prompts, and what is measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from .finite import Finite
from .reward import Reward
from .rollout_settings import Rollout, check_sampling

MEASURED = {"abstained", "accuracy", "length", "stopped"}


@dataclass
class Evaluation:
    """How `validate`, `test` and `predict` let the student act.

    Args:
        samples: per prompt; with more than one, pass@k is reported beside the mean (k = samples).
        temperature: default 0, greedy; needs to be positive for several samples.
        top_p, top_k, min_p: filters, off by default (the rollout's do not apply here).
        horizon: default: the rollout's as it was configured, whatever callbacks turn it to.
        turns: of an episode at most, where there is an environment. Default: as ``horizon``.
        before: score the student (and the teachers, once) before the first training step.
        show: held-out prompts whose completions go to samples.jsonl at each validation.
        by: one or two columns; accuracy is also reported for each of their values, as ``accuracy/web/icon`` (with
            ``()|`` for ``[]/`` in a value), and `test` prints the table.
        metrics: rewards that are measured of the same completions and never trained on, by the name under which their
            mean is logged (``val/<name>``).
        retention: a source of prompts that have nothing to do with what is learned, as in `PromptData`: how much of the
            student before training is left there, logged as ``val/retention/…`` (see `Retention`).

    Raises:
        ValueError: several greedy samples, which would be equal; a value out of range; more than two columns; a metric
            with a name that is taken.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    horizon: int | None = None
    turns: int | None = None
    before: bool = True
    show: int = 3
    by: list[str] = field(default_factory=list)
    metrics: dict[str, Reward] = field(default_factory=dict)
    retention: str | None = None

    __setattr__ = Finite.__setattr__

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"evaluation.samples must be >= 1, got {self.samples}")
        if self.turns is not None and self.turns < 1:
            raise ValueError(f"evaluation.turns must be >= 1, got {self.turns}")
        check_sampling("evaluation", self)
        if taken := MEASURED & self.metrics.keys():
            raise ValueError(f"evaluation.metrics: {', '.join(sorted(taken))} is measured anyway; take another name")
        if len(self.by) > 2:
            raise ValueError(f"evaluation.by: a table has at most two columns to go by, got {self.by}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"evaluation.samples={self.samples} greedy samples would be equal; set evaluation.temperature"
            )

    def go_as_far_as(self, rollout: Rollout) -> None:
        """Takes over horizon and turns of the rollouts, where there are none: callbacks turn those, and not these."""
        self.horizon, self.turns = self.horizon or rollout.horizon, self.turns or rollout.turns

    def check(self, has_rewards: bool, provides: frozenset[str]) -> None:
        """Refuses what a setting cannot measure.

        Args:
            has_rewards: whether there are rewards, and so an accuracy.
            provides: what the setting offers (`Setting.provides`).

        Raises:
            ValueError: `by` without rewards; metrics and retention where nobody writes texts; turns without any.
        """
        if self.by and not has_rewards:
            raise ValueError("evaluation.by breaks accuracy down, which needs a verifier: set model.reward")
        if self.metrics and "categorical" not in provides:
            raise ValueError(
                "evaluation.metrics read completions that are texts, which this setting's students don't write"
            )
        if self.turns is not None and "turn" not in provides:
            raise ValueError(f"evaluation.turns={self.turns}: in this setting a rollout is one turn")
        if self.retention and "categorical" not in provides:
            raise ValueError("evaluation.retention needs a vocabulary, which this setting's students don't have")

    def applied_to(self, rollout: Rollout, horizon: int | None = None) -> Rollout:
        """Overlays a rollout's settings with these; ``horizon`` goes before that of the settings."""
        return dataclasses.replace(
            rollout,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            horizon=horizon or self.horizon or rollout.horizon,
            turns=self.turns,
            prefix_turns=0,
        )
