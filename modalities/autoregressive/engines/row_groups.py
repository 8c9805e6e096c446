"""Rows that must not share a forward pass: of models that can't bear padding, or whose rotary embeddings depend on the
longest row of the pass.

Shape legend: B trajectories, T horizon.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....distribution import Head
from ....policy import Policy
from ....rollout_settings import Rollout
from ..models import context_length, rope_kinds
from .engine import Prompts, RolloutEngine

Written = tuple[Tensor, Tensor]


def check_dynamic(policy: Policy, model: Any, longest: int) -> None:
    """Refuses rows beyond the context of a model with dynamic NTK.

    Raises:
        ValueError: a row of so many tokens would be rotated otherwise at each of its lengths.
    """
    room = context_length(policy)
    if longest > room and any("dynamic" in kind for kind in rope_kinds(model)):
        raise ValueError(
            f"{policy.path}: a row of {longest} tokens is beyond the context of {room}, where dynamic NTK rotates all "
            "tokens anew for each further one: a rollout then has no replay. Lower rollout.horizon or "
            "rollout.max_prompt_length, or choose another rope_type (yarn, linear)"
        )


class EqualLengths(RolloutEngine):
    """Engine by which another one writes rows of equal length together, for models that can't bear padding.

    Args:
        engine: the other one.
        alone: write every row alone, for models whose rows influence each other even so.
    """

    def __init__(self, engine: RolloutEngine, alone: bool = False) -> None:
        self.engine, self.alone = engine, alone

    def write(
        self, policy: Policy, head: Head, prompts: Prompts, rollout: Rollout, seeds: list[int], eos: list[int], pad: int
    ) -> Written:
        def some(rows: list[int]) -> Written:
            row_seeds = [seeds[i] for i in rows]
            return self.engine.write(policy, head, prompts.only(rows), rollout, row_seeds, eos, pad)

        groups = [[i] for i in range(len(seeds))] if self.alone else list(_of_equal_length(prompts))
        return joined([(rows, some(rows)) for rows in groups], pad)


class SwitchingRope(RolloutEngine):
    """Engine by which another one writes for a model with longrope.

    No pass holds rows on both sides of the switch, and a row that passes it is read again and goes on from there.
    """

    def __init__(self, engine: RolloutEngine, switch: int) -> None:
        self.engine, self.switch = engine, switch

    def write(
        self, policy: Policy, head: Head, prompts: Prompts, rollout: Rollout, seeds: list[int], eos: list[int], pad: int
    ) -> Written:
        def some(group: Prompts, rows: list[int], horizon: int) -> Written:
            row_seeds = [seeds[i] for i in rows]
            return self.engine.write(policy, head, group, replace(rollout, horizon=horizon), row_seeds, eos, pad)

        def across(rows: list[int], steps: int) -> Written:
            """Writes rows of equal length, ``steps`` of them before the switch and the rest after it."""
            group = prompts.only(rows)
            tokens, log_probs = some(group, rows, steps)
            going = (~torch.isin(tokens, torch.tensor(eos, device=tokens.device)).any(1)).nonzero().squeeze(1).tolist()
            if not going:
                return tokens, log_probs
            late = some(group.only(going).continued(tokens[going]), [rows[i] for i in going], rollout.horizon - steps)
            (more, more_log_probs), width = joined([(going, late)], pad, len(rows)), tokens.shape[1]
            assert width == steps
            return torch.cat([tokens, more], 1), torch.cat([log_probs, more_log_probs], 1)

        # 1. rows that stay on one side of the switch
        written, length = [], prompts.length
        # − 1: the last token is drawn, but never read
        early = length + rollout.horizon - 1 <= self.switch
        for kind in (early, length > self.switch):
            if rows := kind.nonzero().squeeze(1).tolist():
                written.append((rows, some(prompts.only(rows), rows, rollout.horizon)))
        # 2. rows that pass it, with those of their own length: all of a pass are read again at once
        between = (~early & (length <= self.switch)).nonzero().squeeze(1).tolist()
        for some_of in _of_equal_length(prompts.only(between)) if between else ():
            rows = [between[i] for i in some_of]
            written.append((rows, across(rows, self.switch - int(length[rows[0]]) + 1)))
        return joined(written, pad)


def joined(parts: list[tuple[list[int], Written]], pad: int, count: int | None = None) -> Written:
    """Joins tokens and log-probs of groups of rows to ``[B, T']``.

    Args:
        parts: indices of rows, and their tokens and log-probs.
        pad: id behind the end of a row, and in rows of no group.
        count: B; default: all rows of the groups.
    """
    count = sum(len(rows) for rows, _ in parts) if count is None else count
    width = max(tokens.shape[1] for _, (tokens, _) in parts)
    first, log_probs = parts[0][1]
    all_tokens, all_log_probs = first.new_full((count, width), pad), log_probs.new_zeros(count, width)
    for rows, (tokens, log_probs) in parts:
        all_tokens[rows, : tokens.shape[1]] = tokens
        all_log_probs[rows, : log_probs.shape[1]] = log_probs
    return all_tokens, all_log_probs


def _of_equal_length(prompts: Prompts) -> Iterator[list[int]]:
    length = prompts.length
    for one in length.unique():
        yield (length == one).nonzero().squeeze(1).tolist()
