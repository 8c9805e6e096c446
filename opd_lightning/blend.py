"""Blend: several policies that act as one, whose distributions are mixed at every step.

Shape legend: n states, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .finite import Finite

BLEND = "blend"
"""Its name among the behavior policies."""

HALVINGS = 24
"""Of the interval in which the largest share within the budget lies: 6e-8 is left of it, what float32 resolves."""


@dataclass
class Blend:
    """Mixes distributions at every step; the behavior policy that ``rollout.behavior`` calls ``blend``.

    The student has the share that is left. Who has none is not asked. All arguments are public knobs.

    Args:
        shares: of entries of ``model.teachers``, each of which reads its own view; they sum to 1 or less.
        how: ``mixture`` (default): μ = Σ wᵢ·πᵢ, as if each step were drawn by one of them (MiniLLM, 2306.08543).
            ``geometric``: μ ∝ Π πᵢ^wᵢ, of all distributions the nearest to them by Σ wᵢ·KL(μ‖πᵢ) (TRB, 2605.31159).
        budget: ε, the most that KL(μ‖student) may be at a step, in nats: the shares are lowered by one factor, at each
            step the largest that keeps to it (TRB, 2605.31159). 0: the student acts alone. None: no bound.

    Raises:
        ValueError: shares below 0 or of more than 1 together, or a budget below 0.
    """

    shares: dict[str, float]
    how: Literal["mixture", "geometric"] = "mixture"
    budget: float | None = None

    __setattr__ = Finite.__setattr__

    def __post_init__(self) -> None:
        if not self.shares or min(self.shares.values()) < 0 or sum(self.shares.values()) > 1 + 1e-6:
            raise ValueError(
                f"rollout.blend.shares of teachers must be >= 0 and sum to 1 or less, the student has the rest; got "
                f"{self.shares}"
            )
        if self.how not in ("mixture", "geometric"):
            raise ValueError(f"rollout.blend.how is mixture or geometric, not {self.how!r}")
        if self.budget is not None and self.budget < 0:
            raise ValueError(f"rollout.blend.budget must be >= 0 nats, got {self.budget}")

    @property
    def policies(self) -> dict[str, float]:
        """Shares of the policies that are asked, the student among them where it has one or is what a budget bounds."""
        rest = 1 - sum(self.shares.values())
        if self.budget == 0:
            return {"student": 1.0}
        asked = {name: share for name, share in self.shares.items() if share > 0}
        # shares may sum to a little less than 1
        return {"student": max(rest, 0.0), **asked} if rest > 1e-6 or self.budget is not None else asked

    def mixed(self, log_probs: dict[str, Tensor]) -> Tensor:
        """Computes log μ ``[n, V]`` from the log-probs ``[n, V]`` of each of the `policies`."""
        shares = self.policies
        if self.how == "geometric":
            unbounded = torch.stack([log_probs[name] * share for name, share in shares.items()]).sum(0).log_softmax(-1)
        else:
            unbounded = _mixture([(log_probs[name], share) for name, share in shares.items() if share > 0])
        return unbounded if self.budget is None else self._within(self.budget, log_probs["student"], unbounded)

    def _within(self, budget: float, student: Tensor, unbounded: Tensor) -> Tensor:
        """Goes from the student as far towards the unbounded blend as the budget allows, by bisection.

        KL(μ‖student) grows all the way, so that what keeps to it is an interval that begins at the student.
        """
        factor, beyond = student.new_zeros(len(student), 1), student.new_ones(len(student), 1)
        for _ in range(HALVINGS):
            middle = (factor + beyond) / 2
            fits = _kl(self._between(student, unbounded, middle), student) <= budget
            factor, beyond = torch.where(fits, middle, factor), torch.where(fits, beyond, middle)
        blended = self._between(student, unbounded, factor)
        return torch.where(_kl(unbounded, student) <= budget, unbounded, blended)

    def _between(self, student: Tensor, unbounded: Tensor, factor: Tensor) -> Tensor:
        if self.how == "geometric":
            return torch.lerp(student, unbounded, factor).log_softmax(-1)
        return torch.logaddexp(student + (-factor).log1p(), unbounded + factor.log())


def _mixture(parts: list[tuple[Tensor, float]]) -> Tensor:
    return torch.stack([log_probs + math.log(share) for log_probs, share in parts]).logsumexp(0)


def _kl(one: Tensor, other: Tensor) -> Tensor:
    """Computes KL(one‖other) ``[n, 1]`` of log-probs ``[n, V]``."""
    return (one.exp() * (one - other)).sum(-1, keepdim=True)
