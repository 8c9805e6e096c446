"""Queries of a policy for velocities: at any state of a batch, or at some states of it.

Shape legend: B trajectories, n states, latents ``[...]`` in the family's layout.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...policy import Policy, evaluating
from ...trajectory import Example
from . import flow
from .families import Condition, Family
from .view import REFERENCE

VelocityField = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From rows ``[n]`` of the batch, their latents ``[n, ...]``, and the levels ``[n]`` that a step goes from and to, to
velocities ``[n, ...]``."""


@dataclass(frozen=True)
class RestrictedField:
    """Velocity field at n states: from latents ``[n, ...]`` and the levels ``[n]`` of a step's start and end to
    velocities ``[n, ...]``.

    Attributes:
        field: the policy's, for all trajectories.
        rows: ``[n]`` the trajectories that the states are of.
    """

    field: VelocityField
    rows: Tensor

    def __call__(self, latent: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return self.field(self.rows, latent, t, r)

    def at(self, states: Tensor) -> RestrictedField:
        """Restricts it to some of the n states."""
        return RestrictedField(self.field, self.rows[states])


@dataclass
class VisitedStates:
    """States that the student visited, n of them.

    Attributes:
        latent: ``[n, ...]``.
        t, r: ``[n]`` noise levels of the state and of the end of the student's step.
        clean: ``[n, ...]`` for states of noised data the clean latents; else the next latents.
        seeds: n numbers of the trajectories, for draws.
        other: the field of another policy by its name, without guidance, with that policy's view.
    """

    latent: Tensor
    t: Tensor
    r: Tensor
    clean: Tensor
    seeds: list[int]
    other: Callable[[str], RestrictedField]


def velocity_field(
    policy: Policy,
    family: Family,
    examples: list[Example],
    guidance: float,
    jumps: bool,
    count: Callable[[Tensor], None],
) -> VelocityField:
    """Builds the velocity field of a policy for these examples.

    Args:
        policy: whose they are.
        family: of its pipeline.
        examples: B of them, as the policy reads them.
        guidance: w in v_uncond + w·(v_cond − v_uncond); 1: one forward pass, without v_uncond.
        jumps: the end of a step is an input of the policy.
        count: takes the rows ``[n]`` of each forward pass, one for each state.
    """
    conditions, unconditional = conditions_of(family, examples), []
    if guidance != 1.0:
        unconditional = family.conditions([""] * len(examples), [None] * len(examples))

    def field(rows: Tensor, latent: Tensor, t: Tensor, r: Tensor) -> Tensor:
        end = r if jumps else t
        conditional = velocity(conditions, rows, latent, t, end)
        if guidance == 1.0:
            return conditional
        return flow.guided(conditional, velocity(unconditional, rows, latent, t, end), guidance)

    def velocity(of: list[Condition], rows: Tensor, latent: Tensor, t: Tensor, r: Tensor) -> Tensor:
        count(rows)
        encoded = [of[row] for row in rows.tolist()]
        weight = next(policy.model.parameters())
        device, dtype = weight.device, weight.dtype if weight.is_floating_point() else latent.dtype
        velocities, order = [], []
        # with a gradient it trains, in the mode that it is in
        mode = nullcontext() if torch.is_grad_enabled() else evaluating(policy.model)
        with policy.active(), mode:
            for group in family.batches(encoded):
                at = torch.tensor(group, device=latent.device)
                inputs = _to(family.stack([encoded[i] for i in group]), device, dtype)
                x, start, end = latent[at].to(device, dtype), t[at].to(device), r[at].to(device)
                velocities.append(family.velocity(policy.model, x, start, end, inputs).to(latent.device))
                order.append(at)
        together = torch.cat(velocities)
        return together if len(velocities) == 1 else together[torch.cat(order).argsort()]

    return field


def conditions_of(family: Family, examples: list[Example]) -> list[Condition]:
    """Encodes the prompt of each example for a transformer, and its reference image where there is one."""
    prompts = [example["prompt"] for example in examples]
    return family.conditions(prompts, [example.get(REFERENCE) for example in examples])


def bytes_per_state(family: Family) -> int:
    """Estimates what a transformer keeps of one state for its backward pass."""
    config = family.config
    width = config.get("dim") or config.get("num_attention_heads", 8) * config.get("attention_head_dim", 64)
    layers = sum(config.get(name) or 0 for name in ("num_layers", "num_single_layers", "n_layers")) or 1
    tokens = family.latent_shape[-1] * family.latent_shape[-2] // 4
    return 24 * 4 * width * layers * tokens


def _to(inputs: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)

    return {name: [move(x) for x in v] if isinstance(v, list) else move(v) for name, v in inputs.items()}
