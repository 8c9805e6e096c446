"""EarlyStopRollout: how far rollouts go, and how much of them is trained."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...module import OnPolicyDistillation
from ...optimizer_step import OptimizerStep
from ...trajectory import Trajectories
from ..knobs import KnobCallback
from .rule import HORIZON, StopRule


class EarlyStopRollout(KnobCallback):
    """Ends rollouts early: not generated where the rule knows beforehand, not trained where it has to look.

    Evaluation keeps the horizon that was configured, and no rule goes beyond it. Rewards are those of what was
    generated. Logged: ``train/early_stop/kept``, the share of generated steps that is trained, and
    ``train/early_stop/cut``, the share of trajectories that lost some; for a horizon, ``knob/rollout.horizon``.

    Example::

        callbacks+:
          - class_path: EarlyStopRollout
            init_args: {rule: {class_path: FirstSteps, init_args: {steps: 100}}}

    Args:
        rule: `FirstSteps`, `AdaptiveWindow`, `ChangePoint` or `LowCorrection`.

    Raises:
        ValueError: when training begins: the rule can't work with this run.
    """

    def __init__(self, rule: StopRule) -> None:
        self.rule = rule

    @property
    def knobs(self) -> tuple[str, ...]:
        return self.rule.knobs

    @property
    def asks(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.rule.teacher is None else frozenset({self.rule.teacher})

    @property
    def distributions(self) -> frozenset[str]:  # type: ignore[override]
        return self.asks if self.rule.reads_distribution else frozenset()

    @property
    def state_key(self) -> str:
        return self._generate_state_key(rule=type(self.rule).__name__)

    def check(self, module: OnPolicyDistillation) -> None:
        super().check(module)
        teacher, known = self.rule.teacher, sorted(module.teachers)
        if teacher is not None and teacher not in known:
            raise ValueError(f"{type(self.rule).__name__}.teacher: no {teacher!r} in model.teachers, which has {known}")
        self.rule.begin(module, module.rollout.horizon)

    def advance(self, module: OnPolicyDistillation) -> None:
        if self.rule.horizon is not None:
            self.turn(HORIZON, self.rule.horizon)

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        trajectories = self.rule.complete(module, trajectories)
        kept = self.rule.keep(module, trajectories)
        if kept is None:
            return trajectories
        mask, length = trajectories.mask, trajectories.length
        module.record("early_stop/kept", kept.double(), length.double())
        module.record("early_stop/cut", (kept < length).double())
        return dataclasses.replace(
            trajectories,
            mask=mask & (mask.cumsum(1) <= kept[:, None]),
            # what was cut did not end by itself, of what is trained
            stopped=trajectories.stopped & (kept == length),
        )

    def on_optimizer_step_end(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        self.rule.observe(module, step)
        super().on_optimizer_step_end(module, step)

    def state_dict(self) -> dict[str, Any]:
        return self.rule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict)
