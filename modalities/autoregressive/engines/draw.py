"""Drawing the next token from logits: inverse transform sampling with one uniform number per step and trajectory.

Shape legend: n rows, V vocabulary, T steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....rollout_settings import Rollout

BLOCK = 128
"""Ids whose probabilities are summed first; the running sum then goes over the blocks, and inside a single one."""

BELOW_ONE = 1 - 1e-9
"""By more than rounding, or the end of a running sum could point at an id of probability 0."""


def uniforms(seeds: list[int], steps: int) -> Tensor:
    """``[n, T]`` float64 in [0, 1): a generator for each trajectory, so that nothing depends on its neighbors."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(steps, generator=g, dtype=torch.float64) for g in generators])


def draw(logits: Tensor, uniform: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Ids ``[n]`` and their log-probs ``[n]`` in the plain distribution, from logits ``[n, V]`` and uniform ``[n]``."""
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
    """Sums over all ids ``[n]`` and over each block of them ``[n, V / BLOCK]``; float64."""
    whole = weights.shape[1] // BLOCK * BLOCK
    parts = [weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(2)] if whole else []
    if whole < weights.shape[1]:
        parts.append(weights[:, whole:].sum(1, keepdim=True))
    sums = torch.cat(parts, 1).double()
    return sums.sum(1), sums


def _inverse(weights: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    """``[n]`` the id at which the running sum of weights ``[n, V]`` passes the share ``uniform`` of its end."""
    running = sums.cumsum(1)
    point = uniform.clamp(max=BELOW_ONE)[:, None] * running[:, -1:]
    block = torch.searchsorted(running, point, right=True)
    within = sums.gather(1, block)
    share = ((point - running.gather(1, block) + within) / within).clamp(0, BELOW_ONE)
    places = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    beyond = places >= weights.shape[1]
    inside = weights.gather(1, places.masked_fill(beyond, 0)).double().masked_fill_(beyond, 0.0).cumsum(1)
    return (block * BLOCK + torch.searchsorted(inside, share * inside[:, -1:], right=True)).squeeze(1)


def _floor(weights: Tensor, rollout: Rollout) -> Tensor | None:
    """``[n, 1]`` weights (1 for the likeliest id) below it are filtered out; None without filters.

    As transformers' warpers one after the other: top-k, top-p of what is left, min-p. Ids exactly as likely as the last
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
    """``[n, 1]`` the least of the likeliest ids that have ``share`` of the sum together.

    Only as many of the likeliest are put in order as are needed by the row that needs most.
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
