"""TeacherSync: when a teacher that follows the student moves, and how far."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ..callback import Stateful
from ..module import OnPolicyDistillation
from ..optimizer_step import OptimizerStep
from ..teacher import EMA
from .curriculum import Schedule
from .knobs import KnobCallback


class SyncRule(Stateful):
    """When the teacher moves."""

    needs_reward = False

    def rate(self, step: int) -> float:
        """Returns the student's share in the average at the optimizer step after ``step`` ones were done."""
        return 0.0

    def observe(self, module: OnPolicyDistillation, step: OptimizerStep) -> bool:
        """Observes every optimizer step after it; True: the teacher becomes the student now."""
        return False


class Average(SyncRule):
    """An exponential moving average whose rate changes: teacher ← (1−rate)·teacher + rate·student.

    Args:
        rate: over optimizer steps, such as ``Cosine(0.05, 0.0, 500)``.
    """

    def __init__(self, rate: Schedule) -> None:
        self.schedule = rate

    def rate(self, step: int) -> float:
        return float(self.schedule(step))


class Never(SyncRule):
    """The teacher stays what the student was in the beginning."""


class Every(SyncRule):
    """The teacher becomes the student after every so many optimizer steps, whatever the student is then.

    "When Should the Teacher Move?" (2606.03532) saw training on self-distillation collapse with 1 and 2 steps within
    100, and with 50 after 189; `WhenConsolidated` is its advice.

    Args:
        steps: default 50, the paper's baseline.

    Raises:
        ValueError: steps < 1.
    """

    def __init__(self, steps: int = 50) -> None:
        if steps < 1:
            raise ValueError(f"Every.steps must be >= 1, got {steps}")
        self.steps = steps

    def observe(self, module: OnPolicyDistillation, step: OptimizerStep) -> bool:
        return module.global_step % self.steps == 0


class WhenConsolidated(SyncRule):
    """CGTR of "When Should the Teacher Move?" (2606.03532): the teacher becomes the student once that has improved.

    That is when ``rest`` optimizer steps have gone by since the last time, the mean reward of the last ``window`` steps
    exceeds the reference by more than ``gain``, and the longest trajectory of these steps is at most ``longest`` times
    as long as their mean. The reference is then that mean reward, so it only ever rises. Where it starts is not in the
    paper: here with the mean of the first window.

    Args:
        rest: M_min. Default 30; all defaults are the paper's.
        window: w. Default 5.
        every: optimizer steps between looks. Default 5.
        gain: δ_r. Default 0.05, for rewards in [0, 1].
        longest: L_max. Default 3.2.

    Raises:
        ValueError: a value out of range; when training begins, no reward.
    """

    needs_reward = True
    remembers = ("last", "reference", "seen")

    def __init__(
        self, rest: int = 30, window: int = 5, every: int = 5, gain: float = 0.05, longest: float = 3.2
    ) -> None:
        if min(rest, window, every) < 1 or longest < 1:
            raise ValueError(
                f"WhenConsolidated: rest={rest}, window={window}, every={every} and longest={longest} must be >= 1"
            )
        self.rest, self.window, self.every, self.gain, self.longest = rest, window, every, gain, longest
        self.last, self.reference = 0, math.nan
        self.seen: list[list[float]] = []  # mean reward, mean and largest length of the last steps

    def observe(self, module: OnPolicyDistillation, step: OptimizerStep) -> bool:
        def everywhere(values: list[Tensor]) -> Tensor:
            return module.gather(torch.cat(values).float().to(module.device))

        # 1. the last steps, over all ranks
        reward = everywhere([batch.reward for batch in step.trajectories if batch.reward is not None])
        length = everywhere([batch.length for batch in step.trajectories])
        reward = reward[~reward.isnan()]
        if not len(reward):
            return False  # all abstain: there was nothing to see
        self.seen = [*self.seen, [float(reward.mean()), float(length.mean()), float(length.max())]][-self.window :]
        rewards, means, longest = zip(*self.seen, strict=True)
        if len(self.seen) == self.window and math.isnan(self.reference):
            self.reference = fmean(rewards)
        # 2. all four conditions
        done = module.global_step
        moves = (
            done % self.every == 0
            and done - self.last >= self.rest
            and fmean(rewards) > self.reference + self.gain
            and max(longest) <= self.longest * fmean(means)
        )
        if moves:
            self.last, self.reference = done, fmean(rewards)
        return moves


class TeacherSync(KnobCallback):
    """Moves a teacher whose weights are `EMA`; the rate that these were given is replaced by the rule's.

    Logged: ``knob/teachers.<name>.weights.rate``, and ``train/teacher_sync/syncs``, the share of optimizer steps after
    which the teacher became the student.

    Example::

        callbacks+:
          - class_path: TeacherSync
            init_args: {rule: {class_path: Every, init_args: {steps: 50}}}

    Args:
        rule: `Average`, `Every`, `WhenConsolidated` or `Never`.
        teacher: an entry of ``model.teachers``.

    Raises:
        ValueError: when training begins: the teacher is not there, stands still by nature, or another callback turns
            its rate; the rule reads rewards and there are none.
    """

    def __init__(self, rule: SyncRule, teacher: str = "teacher") -> None:
        self.rule, self.teacher = rule, teacher

    @property
    def rate(self) -> str:
        """The path of the knob that it turns."""
        return f"teachers.{self.teacher}.weights.rate"

    @property
    def knobs(self) -> tuple[str, ...]:
        return (self.rate,)

    def check(self, module: OnPolicyDistillation) -> None:
        teacher = module.teachers.get(self.teacher)
        if teacher is not None and not isinstance(teacher.weights, EMA):
            kind = type(teacher.weights).__name__
            raise ValueError(f"TeacherSync.teacher: {self.teacher}'s weights are {kind}, which never move; use EMA")
        if self.rule.needs_reward and not module.has_rewards:
            raise ValueError(f"TeacherSync.rule: {type(self.rule).__name__} reads rewards; set model.reward")
        super().check(module)

    def advance(self, module: OnPolicyDistillation) -> None:
        self.turn(self.rate, self.rule.rate(module.global_step))

    def on_optimizer_step_end(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        # the average was moved by the module before this hook
        super().on_optimizer_step_end(module, step)
        syncs = self.rule.observe(module, step)
        module.record("teacher_sync/syncs", float(syncs))
        weights = module.teachers[self.teacher].weights
        if syncs and isinstance(weights, EMA):
            weights.copy_student()
            rank_zero_info(f"TeacherSync: {self.teacher} is the student of optimizer step {module.global_step}")

    def state_dict(self) -> dict[str, Any]:
        return self.rule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict)
