"""Forward passes of a micro-batch: which rows share one, how they are aligned, and what is read in one.

Shape legend: B trajectories, n rows of a pass, W its columns, T steps, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...sharding import as_forward
from ...trajectory import Trajectories
from .models import rope_switch

# Measured on 2 x86-64 cores (docs/performance.md). Elsewhere nothing was: a GPU begins a pass in some 10 ms, in which
# it could do some thousand tokens
CPU_PASS_TOKENS, CPU_PASS_COST, PASS_COST = 1280, 128, 2048


def pass_limits(device: torch.device, most: int | None) -> tuple[float, int]:
    """Returns the most tokens of a pass (``most``, or the device's limit) and the cost of a pass, in tokens."""
    limit, cost = (CPU_PASS_TOKENS, CPU_PASS_COST) if device.type == "cpu" else (math.inf, PASS_COST)
    return most or limit, cost


def last_trained(trajectories: Trajectories) -> Tensor:
    """Counts the steps up to and including the last trained one, ``[B]``."""
    step = torch.arange(1, trajectories.mask.shape[1] + 1, device=trajectories.mask.device)
    return (trajectories.mask * step).amax(1)


def passes(length: Tensor, most: float, cost: int) -> list[Tensor]:
    """Partitions rows of ``length [B]`` into forward passes of the least total cost, by dynamic programming.

    The cost is the number of tokens, padding included, and ``cost`` for each pass, which has at most ``most`` tokens; a
    longer row is alone. In an optimal partition passes are intervals of the rows sorted by length.

    Returns:
        Indices of the rows of each pass, longest rows first.
    """
    # stable: equal rows share passes in the same way in every run
    order = length.argsort(descending=True, stable=True)
    width = length[order].numpy()
    best, begin = np.zeros(len(width) + 1), np.zeros(len(width) + 1, dtype=int)
    for stop in range(1, len(width) + 1):
        # the cheapest way of the longest ``stop`` rows, by where its last pass begins
        rows = np.arange(stop, 0, -1)
        tokens = rows * width[:stop]
        total = np.where((tokens <= most) | (rows == 1), best[:stop] + tokens + cost, math.inf)
        begin[stop] = total.argmin()
        best[stop] = total[begin[stop]]
    groups, stop = [], len(width)
    while stop:
        groups.append(order[begin[stop] : stop].sort().values)
        stop = begin[stop]
    return groups[::-1]


def left_align(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Aligns rows of ``[B, W]`` to the first column, without gaps, and cuts W to the longest row."""
    attended = inputs["attention_mask"] > 0
    order = (~attended).int().argsort(dim=1, stable=True)[:, : int(attended.sum(1).max())]
    aligned = {name: t.gather(1, order) if t.shape == attended.shape else t for name, t in inputs.items()}
    if "position_ids" in aligned:  # of padding, too: transformers takes a position that goes back for another text
        aligned["position_ids"] = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return aligned


def body(model: Any, layers: Sequence[int] = (), **inputs: Any) -> Tensor:
    """Runs a model's body: hidden states ``[n, W, H]``, beside which are those of layers, ``[n, W, (1 + L) × H]``."""
    if not layers:
        hidden: Tensor = model.base_model(**inputs)[0]
        return hidden
    output = model.base_model(**inputs, output_hidden_states=True)
    return torch.cat([output[0], *(output.hidden_states[number] for number in layers)], -1)


def read(model: Any, inputs: dict[str, Tensor], layers: Sequence[int] = ()) -> Tensor:
    """Computes hidden states of rows that all begin in the first column, as `body` does.

    Each token is rotated as the last of its row, which it was when the row was written.

    Raises:
        ValueError: rows with images, which can't be cut, beyond the switch of longrope.
    """

    def once(columns: dict[str, Tensor]) -> Tensor:
        hidden: Tensor = as_forward(model, lambda: body(model, layers, **columns, use_cache=False))
        return hidden

    switch, width = rope_switch(model), inputs["input_ids"].shape[1]
    if switch is None or width <= switch:
        return once(inputs)
    if media := {name for name, tensor in inputs.items() if tensor.shape != inputs["input_ids"].shape}:
        raise ValueError(
            f"rows of {width} tokens with {', '.join(sorted(media))}: longrope switches at {switch} tokens, and a row "
            "with images can't be read in two parts; lower rollout.horizon or the size of images"
        )
    early = once({name: tensor[:, :switch] for name, tensor in inputs.items()})
    return torch.cat([early, once(inputs)[:, switch:]], 1)


def at_steps(passes: Iterable[tuple[Tensor, int, Tensor]], last: Tensor, steps: int) -> Tensor:
    """Gathers hidden states ``[B, T, H]`` of steps: that of step t is t columns behind the prompt's last token.

    Args:
        passes: of each its rows, its first column, and its hidden states ``[n, W, H]``.
        last: ``[B]`` columns of the last tokens of prompts.
        steps: T; values behind a row's end are never read.
    """
    parts, order = [], []
    step = torch.arange(steps, device=last.device)
    for rows, start, hidden in passes:
        column = (last[rows.to(last.device), None] - start + step).clamp(max=hidden.shape[1] - 1)
        parts.append(hidden.gather(1, column[..., None].expand(-1, -1, hidden.shape[2])))
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort().to(last.device)] if len(parts) > 1 else parts[0]
