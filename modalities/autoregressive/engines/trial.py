"""A trial of a model before anything is trained: whether it is causal, and which engine can write with it.

Both are tested with a few ids, against the model's own forward pass over one row alone without padding or cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ....agreement import is_rounded
from ....distribution import Head
from ....policy import Policy, evaluating
from ....rollout_settings import Rollout
from ....sharding import as_forward, is_sharded
from ..models import bare
from ..prefix import Prefix, problem_with_prefixes, read_rows, reads_whole_rows
from .engine import Prompts, RolloutEngine
from .generate import Generate
from .row_groups import EqualLengths

# Some need padding beside each other, two can share a pass without any
LENGTHS, WRITTEN = (3, 7, 6, 7), 4
PREFIX = 4
# Nats. In float32 the worst of 117 architectures that were right was 1e-4
EXACT, ROUNDED = 5e-4, 0.1


def check_causal(policy: Policy, vocabulary: int) -> None:
    """Refuses models that are not causal.

    Raises:
        ValueError: the distribution of a token depends on tokens behind it.
    """
    model = bare(policy.model)
    ids = _ids(vocabulary, sum(LENGTHS), next(model.parameters()).device)
    with torch.no_grad(), policy.active(), evaluating(model):
        full = _log_probs(model, ids)
        cut = _log_probs(model, ids[: LENGTHS[1]])
    apart = _apart(full[: LENGTHS[1]].exp(), cut.exp())
    if apart > _tolerance(model):
        raise ValueError(
            f"{policy.path}: what it says of a token depends on those behind it (probabilities {apart:.2g} apart), so "
            "it can't write from left to right: no causal language model, or one whose configuration needs "
            "`is_decoder: true`"
        )


@torch.no_grad()
def check_head(name: str, policy: Policy, head: Head) -> None:
    """Compares head(hidden states) with the model's own logits: otherwise the objective would train another model.

    Raises:
        ValueError: they differ, or there is no body apart from the head.
    """
    model = bare(policy.model)
    if model.base_model is model:
        raise ValueError(
            f"{policy.path} ({name}): {type(model).__name__} has no body apart from its head (its `base_model` is the "
            "model itself), from which hidden states could be taken; this architecture is not supported yet"
        )
    device = next(model.parameters()).device
    ids = torch.arange(min(8, head.vocabulary), device=device)[None]
    try:
        with policy.active(), evaluating(model):
            logits = model(input_ids=ids, use_cache=False).logits[0, :, : head.vocabulary].float()
            hidden = as_forward(model, lambda: model.base_model(input_ids=ids, use_cache=False)[0][0])
        projected = head(hidden)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of foreign code, which may raise anything
        raise ValueError(
            f"{policy.path} ({name}): {type(model).__name__} read {ids.shape[1]} ids and ended in "
            f"{type(error).__name__}: {first_line(error)}; this architecture is not supported yet"
        ) from error
    if head.suppressed is not None:
        logits[:, head.suppressed] = projected[:, head.suppressed] = 0.0
    apart, scale = (projected - logits).abs().max(), logits.abs().max().clamp(min=1.0)
    if apart > 0.02 * scale:
        raise ValueError(
            f"{policy.path} ({name}): its logits are not head(hidden states) with the scale and soft cap that its "
            f"config names (largest difference {float(apart):.3g}); this architecture is not supported yet"
        )


def problem_with_shared_prefix(policy: Policy, head: Head) -> str | None:
    """Explains why a policy must read whole rows, by a trial when it is first asked; None: it need not."""
    if "prefix" not in policy.cache:
        policy.cache["prefix"] = problem_with_prefixes(bare(policy.model)) or _prefix_failure(policy, head)
    problem: str | None = policy.cache["prefix"]
    return problem


def shares_prefixes(policy: Policy, head: Head) -> bool:
    """Tells whether a policy reads once, now, what rows begin with."""
    return problem_with_shared_prefix(policy, head) is None and not reads_whole_rows(bare(policy.model))


@torch.no_grad()
def _prefix_failure(policy: Policy, head: Head) -> str | None:
    """Compares rows behind a prefix that was read once with whole rows."""
    model = bare(policy.model)
    ids = _ids(head.vocabulary, 2 * LENGTHS[1], next(model.parameters()).device).view(2, -1)
    ids[1, :PREFIX] = ids[0, :PREFIX]
    inputs = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids)}
    rows, length = torch.arange(2), torch.full((2,), ids.shape[1])
    shared = Prefix(rows, longer=(Prefix(rows, 0, PREFIX),))
    try:
        with policy.active(), evaluating(model):
            ((_, _, behind),) = read_rows(model, inputs, length, shared, math.inf, 0)
            ((_, _, plain),) = read_rows(model, inputs, length, Prefix(rows), math.inf, 0)
        apart = _apart(head(behind).log_softmax(-1), head(plain[:, PREFIX:]).log_softmax(-1))
    except Exception as error:  # foreign code, which may raise anything where it is not made for this
        return f"{type(error).__name__}: {first_line(error)}"
    return None if apart <= _tolerance(model) else f"{apart:.2g} nats apart"


class Trial:
    """Trial of engines for a policy: the one that was asked for, then slower ways, until log-probs are right.

    Attributes:
        engine: the first whose log-probs are those of the forward pass.
        reason: why it is not the one that was asked for; None: it is.

    Raises:
        ValueError: none is.
    """

    engine: RolloutEngine
    reason: str | None

    def __init__(self, engine: RolloutEngine, policy: Policy, head: Head, pad: int) -> None:
        self._policy, self._head, self._pad = policy, head, pad
        handed_over = engine.refusal(policy) is not None
        # ranks that share weights must make equally many passes, whatever the lengths of their rows
        ways = _apart_ways(engine)[: 1 if is_sharded(bare(policy.model)) else None]
        if not handed_over and not isinstance(engine, Generate):
            ways += [(way, f"generate, {reason or 'whose cache it knows'}") for way, reason in _apart_ways(Generate())]
        failure = None
        for self.engine, self.reason in ways:
            failure = self._failure(self.engine)
            if failure is None:
                return
        raise ValueError(
            f"{policy.path}: {type(bare(policy.model)).__name__} is not supported: it can't be let write what its "
            f"forward pass says of the same tokens, not even one row at a time ({failure})"
        )

    @torch.no_grad()
    def _failure(self, engine: RolloutEngine) -> str | None:
        policy, head = self._policy, self._head
        model = bare(policy.model)
        device = next(model.parameters()).device
        rows = [_ids(head.vocabulary, length, device, i) for i, length in enumerate(LENGTHS)]
        prompts = Prompts(_padded(rows, self._pad), [{} for _ in rows], lambda examples: {}, lambda example: None)
        try:
            with policy.active(), evaluating(model):
                tokens, stored = engine.write(
                    policy, head, prompts, Rollout(horizon=WRITTEN), list(range(len(rows))), [], self._pad
                )
                for row, completion, log_probs in zip(rows, tokens, stored, strict=True):
                    alone = _log_probs(model, torch.cat([row, completion.to(device)]), head)[len(row) - 1 : -1]
                    apart = _apart(alone.gather(1, completion.to(device)[:, None]).squeeze(1), log_probs.to(device))
                    # so NaN fails, too
                    if not apart <= _tolerance(model):
                        return f"{apart:.2g} nats apart"
        except Exception as error:  # foreign code, which may raise anything where it is not made for this
            return f"{type(error).__name__}: {first_line(error)}"
        return None


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text."""
    return next(iter(str(error).strip().splitlines()), "")[:200]


def _log_probs(model: Any, ids: Tensor, head: Head | None = None) -> Tensor:
    """Computes log-probs ``[T, V]`` of one row ``[T]`` by the model itself."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
    if head is not None:
        logits = logits[:, : head.vocabulary]
        if head.suppressed is not None:
            logits = logits.index_fill(1, head.suppressed.to(logits.device), -torch.inf)
    log_probs: Tensor = logits.log_softmax(-1)
    return log_probs


def _apart_ways(engine: RolloutEngine) -> list[tuple[RolloutEngine, str | None]]:
    """Lists ways to write with an engine, from the fastest to the slowest, and why not faster."""
    return [
        (engine, None),
        (EqualLengths(engine), "rows of equal length together: it can't bear padding"),
        (EqualLengths(engine, alone=True), "one row at a time: its rows influence each other"),
    ]


def _ids(vocabulary: int, count: int, device: torch.device, which: int = 0) -> Tensor:
    """Lists ids that differ from each other as far as the vocabulary allows."""
    return torch.arange(count, device=device).mul(3 + which).add(count).remainder(vocabulary)


def _padded(rows: list[Tensor], pad: int) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row.cpu(), 1
    return {"input_ids": ids, "attention_mask": mask}


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _tolerance(model: Any) -> float:
    autocast = torch.is_autocast_enabled(next(model.parameters()).device.type)
    return ROUNDED if autocast or is_rounded(model) else EXACT
