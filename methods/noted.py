"""Weights by what notes found out about a rollout: marks of its steps, and numbers in its row.

Shape legend: N trained steps of a micro-batch, B trajectories.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..objective.signal import Scope
from ..objective.steps import Steps
from ..objective.weight import Weight


def noted(steps: Steps, column: str) -> Tensor:
    """Returns the numbers ``[B]`` that a note wrote as a column, NaN where it had nothing to say."""
    values = [row.get(column) for row in steps.trajectories.examples]
    return torch.tensor([torch.nan if value is None else float(value) for value in values], device=steps.index.device)


class Marked(Weight):
    """Weight of steps that a note marked, and of the others (TRACE, 2605.10194).

    Args:
        inside: of marked steps. Default 1; TRACE's GRPO has 1 − λ/w₀ there, which a `Curriculum` turns.
        outside: of the others. Default 0.
        channel: where the marks are. Default ``spans``, which the note `Spans` fills.

    Raises:
        ValueError: a weight below 0.
    """

    scope: Scope = "data"

    def __init__(self, inside: float = 1.0, outside: float = 0.0, channel: str = "spans") -> None:
        if min(inside, outside) < 0:
            raise ValueError(f"weight: inside and outside must be >= 0, got {inside} and {outside}")
        self.inside, self.outside, self.channel = inside, outside, channel
        self.needs = frozenset({channel})
        self.advice = {channel: "name a note that fills this channel in model.notes, such as Spans"}

    def __call__(self, steps: Steps) -> Tensor:
        return torch.where(steps.channel(self.channel) > 0, self.inside, self.outside)


class Confident(Weight):
    """Weight of one of K teachers by how sure each says to be: softmax over them of c/100/τ (MAD-OPD, 2605.01347).

    1/K where one of them does not say, as in MAD-OPD's code.

    Args:
        of: the column with what this term's teacher says, from 0 to 100, which a note has to write (`Stated`).
        among: the columns of all K, its own among them.
        tau: τ, default 1 (MAD-OPD).

    Raises:
        ValueError: its own column is not among them, or τ is not positive.
    """

    scope: Scope = "data"

    def __init__(
        self, of: str = "confidence_a", among: tuple[str, ...] = ("confidence_a", "confidence_b"), tau: float = 1.0
    ) -> None:
        if of not in among or tau <= 0:
            raise ValueError(f"Confident: {of!r} has to be among {list(among)}, and tau > 0, got {tau}")
        self.of, self.among, self.tau = of, tuple(among), tau
        self.needs = frozenset(among)
        self.advice = dict.fromkeys(among, "name a note that writes this column in model.notes")

    def __call__(self, steps: Steps) -> Tensor:
        confidence = torch.stack([noted(steps, column) for column in self.among]).clamp(0, 100)
        shares = (confidence / 100 / self.tau).softmax(0)[self.among.index(self.of)]
        return steps.per_trajectory(shares.nan_to_num(1 / len(self.among)))


class Deficit(Weight):
    """Weight of one of several teachers by what a rollout lacks of its metric: d / max(Σ d, 1), d = 1 − metric.

    SELFCI (2605.20258): who is shown what may be told counts by the utility that is missing, who is shown what must not
    be, by the integrity. Where a metric abstains nothing is missing.

    Args:
        of: the column with this term's metric, in [0, 1], which a note has to write (`Measured`).
        among: the columns of all of them, its own among them.

    Raises:
        ValueError: its own column is not among them.
    """

    scope: Scope = "data"

    def __init__(self, of: str = "utility", among: tuple[str, ...] = ("utility", "integrity")) -> None:
        if of not in among:
            raise ValueError(f"Deficit: {of!r} has to be among {list(among)}")
        self.of, self.among = of, tuple(among)
        self.needs = frozenset(among)
        self.advice = dict.fromkeys(among, "name a note that writes this column in model.notes, such as Measured")

    def __call__(self, steps: Steps) -> Tensor:
        metrics = torch.stack([noted(steps, column) for column in self.among])
        missing = (1 - metrics.clamp(0, 1)).nan_to_num(0.0)
        return steps.per_trajectory(missing[self.among.index(self.of)] / missing.sum(0).clamp(min=1))
