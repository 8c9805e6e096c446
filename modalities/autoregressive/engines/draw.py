"""Drawing the next token from logits: inverse transform sampling with one uniform number per step and trajectory.

Shape legend: n rows, V vocabulary, T steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....rollout_settings import Rollout

BLOCK = 128
"""Ids per block: probabilities are summed per block, then the running sum goes over blocks and inside a single one."""

BELOW_ONE = 1 - 1e-9
"""Upper bound of a draw, below 1 by more than rounding: the end of a running sum could be an id of probability 0."""


def uniforms(seeds: list[int], steps: int) -> Tensor:
    """Draws ``[n, T]`` float64 in [0, 1), by one generator per trajectory, so that nothing depends on its neighbors."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(steps, generator=g, dtype=torch.float64) for g in generators])


def draw(logits: Tensor, uniform: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Draws ids ``[n]`` from logits ``[n, V]`` by uniform ``[n]``, with their log-probs ``[n]`` without filters."""
    if rollout.temperature == 0:
        peak, ids = logits.max(1)
        return ids, peak - logits.logsumexp(1)
    peak = logits.amax(1, keepdim=True)
    plain = (logits - peak).exp_()
    total, sums = _sums(plain)
    shaped = plain if rollout.temperature == 1 else ((logits - peak) / rollout.temperature).exp_()
    if (floor := _floor(shaped, rollout)) is not None:
        shaped = shaped.where(shaped >= floor, 0.0)
    ids = _inverse(shaped, sums if shaped is plain else _sums(shaped)[1], uniform)
    return ids, (logits.gather(1, ids[:, None]) - peak).squeeze(1) - total.log().to(logits.dtype)


def _sums(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sums weights over all ids ``[n]`` and over each block of them ``[n, V / BLOCK]``; float64."""
    in_blocks = weights.shape[1] // BLOCK * BLOCK
    parts = [weights[:, :in_blocks].unflatten(1, (-1, BLOCK)).sum(2)] if in_blocks else []
    if in_blocks < weights.shape[1]:
        parts.append(weights[:, in_blocks:].sum(1, keepdim=True))
    sums = torch.cat(parts, 1).double()
    return sums.sum(1), sums


def _inverse(weights: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    """Finds the id ``[n]`` at which the running sum of weights ``[n, V]`` passes the share ``uniform`` of its end."""
    running = sums.cumsum(1)
    point = uniform.clamp(max=BELOW_ONE)[:, None] * running[:, -1:]
    block = torch.searchsorted(running, point, right=True)
    within = sums.gather(1, block)
    # as a share of the block's sum, since its ids are summed in another precision below
    share = ((point - running.gather(1, block) + within) / within).clamp(0, BELOW_ONE)
    places = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    beyond = places >= weights.shape[1]
    inside = weights.gather(1, places.masked_fill(beyond, 0)).double().masked_fill_(beyond, 0.0).cumsum(1)
    return (block * BLOCK + torch.searchsorted(inside, share * inside[:, -1:], right=True)).squeeze(1)


def _floor(weights: Tensor, rollout: Rollout) -> Tensor | None:
    """Computes the weight ``[n, 1]`` below which ids are filtered out (1: the likeliest id's); None without filters.

    As transformers' warpers one after the other: top-k, top-p of the rest, min-p. Ids exactly as likely as the last
    one kept are kept, too.
    """
    floor = None
    if rollout.top_k is not None:
        floor = weights.topk(min(rollout.top_k, weights.shape[1])).values[:, -1:]
    if rollout.top_p is not None and rollout.top_p < 1:
        left = weights if floor is None else weights.where(weights >= floor, 0.0)
        floor = _nucleus(left, rollout.top_p)
    if rollout.min_p is not None:
        least = weights.new_full((len(weights), 1), rollout.min_p)
        floor = least if floor is None else torch.maximum(floor, least)
    return floor


def _nucleus(weights: Tensor, share: float) -> Tensor:
    """Computes the smallest weight ``[n, 1]`` of the likeliest ids that have ``share`` of the sum together.

    Only as many ids are sorted as the row with the largest nucleus needs.
    """
    size, end = weights.shape[1], weights.sum(1, keepdim=True, dtype=torch.float64)
    count = min(BLOCK, size)
    while True:
        likeliest = weights.topk(count).values if count < size else weights.sort(1, descending=True).values
        running = likeliest.double().cumsum(1)
        if count == size or bool((running[:, -1:] >= share * end).all()):
            break
        count = min(8 * count, size)
    last = (running < share * end).sum(1, keepdim=True).clamp(max=count - 1)
    return likeliest.gather(1, last)
