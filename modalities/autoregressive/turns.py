"""Turns: which of them a step belongs to, and recorded ones that rollouts go on from.

A turn is what a policy writes in one go, and what it reads before that: turn 0 reads the prompt, a later one what was
observed behind the turn before it.

Shape legend: B trajectories, T steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, cast

import torch

from ...objective import Objective
from ...policy import Acting, Policy
from ...rollout_settings import Rollout
from ...trajectory import Example, Trajectories
from .audit import given_ids
from .writing import Writing, go_on

TURN = "turn"
"""Channel with the turn of each step; part of ``needs`` of what reads it."""


class Turning(Writing, Protocol):
    """Interface of a setting whose rollouts may have several turns."""

    objective: Objective


class TakingTurns:
    """Mixin of a setting whose policies go on behind what was written and observed before."""

    def prefixes(self, policy: Policy, examples: list[Example], seen: list[Example], rollout: Rollout) -> Trajectories:
        """Collects recorded turns (`Setting.prefixes`)."""
        return prefixes(cast(Turning, self), policy, examples, seen, rollout)

    def go_on(self, acting: Acting, begun: Trajectories, rollout: Rollout, seeds: list[int]) -> Trajectories:
        """Writes behind what was begun (`Setting.go_on`)."""
        return go_on(cast(Turning, self), acting, begun, rollout, seeds)


def counts_turns(module: Turning, rollout: Rollout) -> bool:
    """Tells whether trajectories have the channel ``turn``; those of one generation batch all have, or none has."""
    return bool(rollout.prefix_turns) or any(TURN in part.needs for t in module.objective.terms for part in t.parts())


def with_turns(trajectories: Trajectories) -> Trajectories:
    """Adds the channel ``turn``: a turn ends where steps that are trained are followed by others."""
    written = trajectories.mask.long()
    ends = torch.nn.functional.pad((written[:, :-1] - written[:, 1:]).clamp(min=0), (1, 0))
    return replace(trajectories, channels={**trajectories.channels, TURN: ends.cumsum(1)})


def prefixes(
    module: Turning, policy: Policy, examples: list[Example], seen: list[Example], rollout: Rollout
) -> Trajectories:
    """Collects the recorded turns that rollouts go on from, ``rollout.prefix_turns`` of each row."""
    rows = [_prefix(module, example, view, policy, rollout) for example, view in zip(examples, seen, strict=True)]
    width = max(1, *(len(ids) for ids, _ in rows))
    actions = torch.full((len(rows), width), module.padding_id)
    mask = torch.zeros(actions.shape, dtype=torch.bool)
    for i, (ids, written) in enumerate(rows):
        actions[i, : len(ids)], mask[i, : len(ids)] = torch.tensor(ids), torch.tensor(written)
    held = torch.arange(width) < torch.tensor([len(ids) for ids, _ in rows])[:, None]
    stopped = torch.zeros(len(rows), dtype=torch.bool)
    known = with_turns(Trajectories({}, actions, mask, examples, stopped, torch.zeros(mask.shape)))
    return replace(known, mask=held)


def problem_with_prefix(module: Turning, example: Example) -> str | None:
    """Finds why a rollout can't go on from a row's recorded turns; None if it can."""
    rollout, student = module.rollout, module.policies["student"]
    if not rollout.prefix_turns:
        return None
    (view,) = module.shown([example])
    length = len(_prefix(module, example, view, student, rollout)[0])
    if length < rollout.horizon:
        return None
    return (
        f"what rollout.prefix_turns={rollout.prefix_turns} goes on from has {length} tokens, and rollout.horizon is "
        f"{rollout.horizon}, which leaves none to write"
    )


def _prefix(
    module: Turning, example: Example, seen: Example, policy: Policy, rollout: Rollout
) -> tuple[list[int], list[bool]]:
    """Lists the ids of a row's recorded turns, observations included, and which of them the assistant wrote."""
    if module.answered(example, seen, policy).get("completion") is None:
        return [], []
    ids, written = given_ids(module, example, seen, policy)
    starts = [i for i, own in enumerate(written) if own and not (i and written[i - 1])]
    begin = starts[min(rollout.prefix_turns, len(starts) - 1)]
    return ids[:begin], written[:begin]
