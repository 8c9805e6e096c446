"""Trajectories of latents: how they are stored, retraced and counted.

Shape legend: B trajectories, T denoising steps, n states, latents ``[...]`` in the family's layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...callback import DistillationCallback
from ...trajectory import Example, Trajectories
from . import flow
from .query import VelocityField

EVALUATIONS = "evaluations"
"""Observation ``[B]``: network evaluations of each trajectory, by whichever thread."""


def trajectories_of(
    examples: list[Example],
    start: Tensor,
    after: Tensor,
    sigma: Tensor,
    toward: Tensor,
    trained: Tensor,
    seeds: list[int],
) -> Trajectories:
    """Stores B trajectories on the CPU, without densities and as if they took no network evaluation.

    Args:
        examples: B of them.
        start: ``[B, ...]`` where they begin.
        after: ``[B, T, ...]`` where each step leads.
        sigma, toward: ``[B, T]`` noise levels of each state and of the end of its step.
        trained: ``[B, T]`` bool.
        seeds: B numbers for draws.
    """
    trajectories = Trajectories(
        observation={
            "start": start,
            "seed": torch.tensor(seeds),
            EVALUATIONS: torch.zeros(len(examples), dtype=torch.long),
        },
        actions=after,
        mask=trained,
        examples=examples,
        stopped=torch.ones(len(examples), dtype=torch.bool),
        behavior_log_probs=torch.full(trained.shape, torch.nan, dtype=torch.float32),
        # float64, in which `flow.euler` steps
        channels={"sigma": sigma.double(), "toward": toward.double()},
    )
    return trajectories.to("cpu")


def retrace(field: VelocityField, trajectories: Trajectories, rows: Tensor, at: Tensor) -> Tensor:
    """Recomputes the states ``[n, ...]`` at steps ``at [n]`` of some trajectories, with gradient."""
    sigma, toward = trajectories.channels["sigma"], trajectories.channels["toward"]
    latent = trajectories.observation["start"][rows]
    for k in range(int(at.max())):
        on = (at > k).nonzero().squeeze(-1)
        t, r = sigma[rows[on], k], toward[rows[on], k]
        v = field(rows[on], latent[on], t, r)
        # not in place: the gradient goes through the states before
        latent = latent.index_copy(0, on, flow.euler(latent[on], v, t, r))
    return latent


class CountRollouts(DistillationCallback):
    """Counts the network evaluations of each generation batch that is about to be trained, whichever thread made it."""

    def on_rollouts(self, module: Any, trajectories: Trajectories) -> Trajectories:
        module.network_evaluations += int(trajectories.observation[EVALUATIONS].sum())
        return trajectories
