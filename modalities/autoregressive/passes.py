"""How a micro-batch is cut into forward passes, and how its rows are aligned in each.

Shape legend: B trajectories, W columns of a pass.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...trajectory import Trajectories

# Measured on 2 x86-64 cores (docs/performance.md). Elsewhere nothing was: a GPU begins a pass in some 10 ms, in which
# it could do some thousand tokens
CPU_PASS_TOKENS, CPU_PASS_COST, PASS_COST = 1280, 128, 2048


def pass_limits(device: torch.device, most: int | None) -> tuple[float, int]:
    """The most tokens of a pass (``most``, or what suits the device), and how many tokens more would take as long as
    another pass."""
    limit, cost = (CPU_PASS_TOKENS, CPU_PASS_COST) if device.type == "cpu" else (math.inf, PASS_COST)
    return most or limit, cost


def last_trained(trajectories: Trajectories) -> Tensor:
    """``[B]`` steps up to and including the last trained one."""
    place = torch.arange(1, trajectories.mask.shape[1] + 1, device=trajectories.mask.device)
    return (trajectories.mask * place).amax(1)


def passes(length: Tensor, most: float, cost: int) -> list[Tensor]:
    """Indices of ``length [B]`` cut into forward passes: no cut has fewer tokens, padding and ``cost`` for each pass
    included, where a pass has at most ``most`` tokens (a row that is longer is alone). Rows of like length go together.
    """
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
    found, stop = [], len(width)
    while stop:
        found.append(order[begin[stop] : stop].sort().values)
        stop = begin[stop]
    return found[::-1]


def left_align(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs ``[B, W]`` whose rows all begin in the first column, without gaps, as wide as the longest is long."""
    seen = inputs["attention_mask"] > 0
    order = (~seen).int().argsort(dim=1, stable=True)[:, : int(seen.sum(1).max())]
    together = {name: t.gather(1, order) if t.shape == seen.shape else t for name, t in inputs.items()}
    if "position_ids" in together:  # of padding, too: transformers takes a position that goes back for another text
        together["position_ids"] = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return together
