"""Weights by how far a teacher agrees with itself through several views.

Shape legend: N steps of a micro-batch, K views, B trajectories of T steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..objective.generation import Generation
from ..objective.steps import Steps
from ..objective.weight import Weight

CONTEXTS = ("context_1", "context_2", "context_3")


class _Contexts:
    needs = frozenset({"categorical"})

    def __init__(self, contexts: Sequence[str] = CONTEXTS, gamma: float = 0.01) -> None:
        if gamma < 0:
            raise ValueError(f"weight.gamma must be >= 0, got {gamma}")
        if len(contexts) < 2:
            raise ValueError(f"weight.contexts: it takes two to disagree, got {list(contexts)}")
        self.contexts, self.gamma = contexts, gamma
        self.reads = frozenset(f"{name}/log_prob" for name in contexts)


class StepAgreement(_Contexts, Weight):
    """Weight 1/(1 + γ·min(v/v₉₅, 10)), v the variance of the action's log-prob over views (UniSD, 2605.06597).

    v₉₅ is the 95th percentile of v over the generation batch. At least 0.01; 1 where fewer than two views show
    anything.

    Args:
        contexts: entries of ``model.teachers``, one for each view.
        gamma: γ, default 0.01 (UniSD's script).

    Raises:
        ValueError: gamma below 0, or fewer than two contexts.
    """

    scope = "generation"

    def settle(self, generation: Generation) -> Tensor:
        log_probs = torch.stack([generation.statistics[f"{name}/log_prob"].double() for name in self.contexts])
        variance = _variance(log_probs, ~log_probs.isnan(), 1)
        known = generation.on & ~variance.isnan()
        everywhere = generation.everywhere(variance[known])
        if not len(everywhere):
            return torch.ones_like(variance).float()
        scale = everywhere.quantile(0.95).clamp(min=1e-6)
        weight = 1 / (1 + self.gamma * (variance / scale).clamp(max=10))
        return torch.where(known, weight, 1.0).clamp(min=0.01).float()


class TrajectoryAgreement(_Contexts, Weight):
    """Weight exp(−γ·v), v the variance over views of a trajectory's mean log-prob (UniSD, 2605.06597).

    At least 1e-6; 1 where fewer than two views show anything.

    Args:
        contexts: entries of ``model.teachers``, one for each view.
        gamma: γ, default 0.01 (UniSD's script).

    Raises:
        ValueError: gamma below 0, or fewer than two contexts.
    """

    scope = "row"

    def __call__(self, steps: Steps) -> Tensor:
        count = torch.zeros(len(steps.trajectories), dtype=torch.float64, device=steps.index.device)
        length = count.index_add(0, steps.trajectory, torch.ones_like(steps.trajectory, dtype=count.dtype))
        sums = [
            count.index_add(0, steps.trajectory, steps.statistic(f"{name}/log_prob").double()) for name in self.contexts
        ]
        known = [count.index_add(0, steps.trajectory, steps.knows(name).double()) > 0 for name in self.contexts]
        variance = _variance(torch.stack(sums) / length.clamp(min=1), torch.stack(known), 0)
        weight = (-self.gamma * variance).exp().nan_to_num(nan=1.0).clamp(min=1e-6)
        return steps.per_trajectory(weight).float()


def _variance(values: Tensor, known: Tensor, correction: int) -> Tensor:
    """Computes the variance over K of ``values [K, …]`` where they are known; NaN where fewer than two are."""
    count = known.sum(0)
    mean = values.where(known, 0.0).sum(0) / count
    squares = (values - mean).square().where(known, 0.0).sum(0)
    return torch.where(count > 1, squares / (count - correction), torch.nan)
