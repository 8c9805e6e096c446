"""Writing: by which engine a setting's policies write, alone or as one, and what becomes of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ...blend import Blend
from ...distribution import Head
from ...policy import Acting, Policy
from ...rollout_settings import Rollout
from ...sharding import is_sharded
from ...trajectory import Example, Trajectories
from .audit import Audited, stop_ids
from .engines import Prompts, RolloutEngine, Writer
from .engines.engine import until_stop
from .engines.row_groups import SwitchingRope, check_dynamic
from .models import bare, rope_switch


class Writing(Audited, Protocol):
    """Interface of a setting whose policies write."""

    def media(self, examples: list[Example], policy: Policy) -> dict[str, Tensor]: ...
    def cache_key(self, example: Example) -> Hashable: ...
    def observing(self, policy: Policy, example: Example, values: list[dict[str, Any]]) -> Example: ...
    def typed(self, name: str, ids: Tensor) -> Tensor: ...
    def head(self, policy: Policy) -> Head: ...


def write(module: Writing, acting: Acting, rollout: Rollout, seeds: list[int]) -> Trajectories:
    """Lets one policy write."""
    policy, prompts = acting.policy, prompts_of(module, acting, rollout)
    with policy.active():
        engine, head = engine_of(module, policy), module.head(policy)
        written = engine.write(policy, head, prompts, rollout, seeds, module.eos, module.padding_id)
    return _completed(module, prompts, written)


def write_blended(
    module: Writing, acting: dict[str, Acting], blend: Blend, rollout: Rollout, seeds: list[int]
) -> Trajectories:
    """Lets several policies write as one; the observation is that of the first."""
    writers = {
        name: Writer(
            one.policy, module.head(one.policy), prompts_of(module, one, rollout), stop_ids(module, one.policy)
        )
        for name, one in acting.items()
    }
    written = module.engine.write_blended(writers, blend, rollout, seeds, module.eos, module.padding_id)
    return _completed(module, next(iter(writers.values())).prompts, written)


def go_on(module: Writing, acting: Acting, begun: Trajectories, rollout: Rollout, seeds: list[int]) -> Trajectories:
    """Lets one policy write behind what was begun; the horizon counts both."""
    # 1. the policy writes behind its prompts and what is held
    policy, prompts = acting.policy, prompts_of(module, acting, rollout)
    held, left = begun.extent, rollout.horizon - begun.extent
    behind = prompts.behind([row[:n].tolist() for row, n in zip(begun.actions, held, strict=True)], begun.visible)
    with policy.active():
        engine, shorter = engine_of(module, policy), replace(rollout, horizon=max(1, int(left.max())))
        written = engine.write(policy, module.head(policy), behind, shorter, seeds, module.eos, module.padding_id)
    later = _completed(module, prompts, written)
    # 2. cut where the horizon of each row is, and joined
    beyond = later.mask & (torch.arange(later.mask.shape[1]) >= left[:, None])
    later = replace(later, mask=later.mask & ~beyond, stopped=later.stopped & ~beyond.any(1))
    if (turn := begun.channels.get("turn")) is not None:
        last = turn.gather(1, (held[:, None] - 1).clamp(min=0)).where(held[:, None] > 0, 0)
        later.channels["turn"] = last.expand(later.mask.shape)
    return begun.followed_by(later)


def prompts_of(module: Writing, acting: Acting, rollout: Rollout) -> Prompts:
    """Prepares the prompts that a policy continues.

    Raises:
        ValueError: as in `check_dynamic`.
    """
    policy = acting.policy
    prompts = Prompts(
        acting.prompts,
        acting.examples,
        partial(module.media, policy=policy),
        module.cache_key,
        observing=partial(module.observing, policy),
        typed=module.typed,
    )
    check_dynamic(policy, bare(policy.model), int(prompts.length.max()) + rollout.horizon)
    return prompts


def engine_of(module: Writing, policy: Policy) -> RolloutEngine:
    """Returns the engine of a policy: ``model.engine``, with rows separated that it can't read together."""
    trial = module.trials.get(policy.name)
    engine = module.engine if trial is None or trial.reason is None else trial.engine
    model = bare(policy.model)
    switch = rope_switch(model) if engine.runs_the_model and not is_sharded(model) else None
    return engine if switch is None else SwitchingRope(engine, switch)


def _completed(module: Writing, prompts: Prompts, written: tuple[Tensor, Tensor]) -> Trajectories:
    """Converts what was written to trajectories, on the CPU."""
    tokens, log_probs = written
    mask, stopped = until_stop(tokens, module.eos)
    return Trajectories(
        observation=prompts.tokens,
        actions=tokens.masked_fill(~mask, module.padding_id).cpu(),
        mask=mask.cpu(),
        examples=[*prompts.examples],
        stopped=stopped.cpu(),
        behavior_log_probs=log_probs.masked_fill(~mask, 0.0).cpu(),
    )
