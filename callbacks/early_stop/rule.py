"""StopRule: where rollouts end. FirstSteps is the simplest one."""

from __future__ import annotations

from torch import Tensor

from ...callback import Stateful
from ...module import OnPolicyDistillation
from ...optimizer_step import OptimizerStep
from ...trajectory import Trajectories

HORIZON = "rollout.horizon"


class StopRule(Stateful):
    """Decides where rollouts end: beforehand, by its ``horizon``, or afterwards, by what it says to `keep`.

    Attributes:
        knobs: the horizon's path for a rule that sets it, so that nobody else turns it.
        horizon: steps after which generation ends; None: the rule leaves that to others.
        teacher: an entry of ``model.teachers`` that it queries, if any.
        reads_distribution: whether it reads more of that teacher than log-probs of actions.
    """

    knobs: tuple[str, ...] = ()
    horizon: int | None = None
    teacher: str | None = None
    reads_distribution: bool = False

    def begin(self, module: OnPolicyDistillation, longest: int) -> None:
        """Prepares for a run whose rollouts have at most ``longest`` steps.

        Raises:
            ValueError: the rule cannot work with this run.
        """

    def complete(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        """Returns the rollouts, generated further where they go on; default: as they are."""
        return trajectories

    def keep(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Tensor | None:
        """Returns ``[B]`` how many of the trained steps of each trajectory stay trained, from the first on.

        None: all of them.
        """
        return None

    def observe(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        """Looks back on an optimizer step after its update."""


class FirstSteps(StopRule):
    """ESR (2605.27028): nothing beyond the first N steps is generated at all, at every optimizer step alike.

    Args:
        steps: N. Default 100, for tokens (the paper's; 50 where teacher and student are of different families).

    Raises:
        ValueError: steps < 1.
    """

    knobs = (HORIZON,)

    def __init__(self, steps: int = 100) -> None:
        if steps < 1:
            raise ValueError(f"FirstSteps.steps must be >= 1, got {steps}")
        self.steps = steps

    def begin(self, module: OnPolicyDistillation, longest: int) -> None:
        self.horizon = min(self.steps, longest)
