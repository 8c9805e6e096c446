"""Contract of the four methods of a setting; every message names the class, the method and the fact.

Shape legend: B trajectories, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .distribution import Categorical
from .printable import quoted
from .scoring import as_number, described
from .setting import Setting
from .trajectory import Example, Trajectories

METHODS = ("collate", "sample", "distribution", "rewards")


def check_methods(setting: Setting) -> None:
    """Refuses settings that are not complete.

    Raises:
        TypeError: a setting lacks one of the four methods.
    """
    missing = [name for name in METHODS if getattr(type(setting), name) is getattr(Setting, name)]
    if missing:
        raise TypeError(
            f"{type(setting).__name__} has no method {', no '.join(missing)}: a setting implements "
            f"{', '.join(METHODS[:-1])} and {METHODS[-1]}"
        )


def check_prompts(setting: Setting, prompts: Any, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Checks the value of `collate`.

    Raises:
        TypeError: no mapping from names to tensors.
        ValueError: a tensor without a row for each example.
    """
    where = f"{type(setting).__name__}.collate"
    if not isinstance(prompts, dict):
        raise TypeError(f"{where} returned {_kind(prompts)}; it has to return a dict of tensors [B, ...] by name")
    for name, tensor in prompts.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: {name!r} is {_kind(tensor)}; it has to be a tensor [B, ...]")
        if tensor.dim() < 1 or len(tensor) != len(examples):
            raise ValueError(
                f"{where}: {name!r} has the shape {list(tensor.shape)}; there are {len(examples)} examples, so it has "
                f"to be [{len(examples)}, ...]"
            )
    return prompts


def check_acted(setting: Setting, acted: Any, examples: Sequence[Example], method: str = "sample") -> Trajectories:
    """Checks the value of `sample` or `replay`.

    Raises:
        TypeError: no `Trajectories`.
        ValueError: a field of another shape or kind than `Trajectories` says, or no log-probs of sampled steps although
            a part of the objective reads them.
    """
    # 1. trajectories with a mask, one for each example
    where = f"{type(setting).__name__}.{method}"
    if not isinstance(acted, Trajectories):
        raise TypeError(f"{where} returned {_kind(acted)}; it has to return Trajectories")
    if not isinstance(acted.mask, Tensor) or acted.mask.dim() != 2 or acted.mask.dtype != torch.bool:
        raise ValueError(f"{where}: mask is {_kind(acted.mask)}; it has to be a bool tensor [B, T]")
    count, steps = acted.mask.shape
    if count != len(examples):
        raise ValueError(f"{where}: mask has {count} rows; there are {len(examples)} examples")
    # 2. fields that go with the mask; what is not listed is the loader's
    shapes = {"actions": (count, steps), "behavior_log_probs": (count, steps), "stopped": (count,)}
    fields = {name: (getattr(acted, name), shape) for name, shape in shapes.items()}
    fields |= {f"channels[{name!r}]": (tensor, (count, steps)) for name, tensor in acted.channels.items()}
    fields |= {f"observation[{name!r}]": (tensor, (count,)) for name, tensor in acted.observation.items()}
    for name, (tensor, shape) in fields.items():
        exact = name in ("behavior_log_probs", "stopped")
        actual = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
        if actual is None or actual[: len(shape)] != shape or (exact and actual != shape):
            needed = ", ".join([*map(str, shape), *([] if exact else ["..."])])
            raise ValueError(f"{where}: {name} is {_kind(tensor)}; beside a mask [{count}, {steps}] it is [{needed}]")
    if acted.stopped.dtype != torch.bool:
        raise ValueError(f"{where}: stopped is {_kind(acted.stopped)}; it has to be a bool tensor [B]")
    # 3. log-probs where a part reads them
    readers = sorted(
        {type(part).__name__ for term in setting.objective.active for part in term.parts() if "behavior" in part.needs}
    )
    if method == "sample" and readers and bool(acted.behavior_log_probs[acted.mask].isnan().any()):
        raise ValueError(f"{where}: behavior_log_probs are NaN at trained steps, and {', '.join(readers)} reads them")
    return acted


def check_rollouts(callback: Any, trajectories: Any) -> Trajectories:
    """Checks the value of a callback's `on_rollouts`.

    Raises:
        TypeError: no `Trajectories`.
    """
    if not isinstance(trajectories, Trajectories):
        raise TypeError(
            f"{type(callback).__name__}.on_rollouts returned {_kind(trajectories)}; it has to return the Trajectories "
            "that are trained, those that it was given where it changes nothing"
        )
    return trajectories


def check_family(setting: Setting, said: Any) -> None:
    """Checks the family of `distribution`'s value against ``provides``.

    Raises:
        TypeError: ``provides`` names "categorical", and it is not.
    """
    if "categorical" in setting.provides and not isinstance(said, Categorical):
        raise TypeError(
            f"{type(setting).__name__}.distribution returned a {type(said).__name__}, and `provides` names "
            "'categorical', which promises a Categorical; leave it out of `provides`"
        )


def check_scores(
    setting: Setting, scores: Any, trajectories: Trajectories
) -> tuple[Tensor | None, list[dict[str, Any]]]:
    """Checks the value of `rewards`; returns rewards ``[B]`` (float32, CPU, NaN where one abstains) and rows to show.

    Raises:
        TypeError: no pair of rewards and rows.
        ValueError: rewards or rows of another number than the trajectories', or rewards that are not finite.
    """
    # 1. a pair, with a row per trajectory
    where, count = f"{type(setting).__name__}.rewards", len(trajectories)
    if not isinstance(scores, tuple) or len(scores) != 2:
        raise TypeError(f"{where} returned {_kind(scores)}; it has to return rewards (or None) and a list of dicts")
    rewards, rows = scores
    if not isinstance(rows, list) or len(rows) != count or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{where}: what to show is {_kind(rows)}; it has to be a list of {count} dicts")
    # 2. rewards where they are promised, and only there
    if rewards is None:
        if setting.has_rewards:
            raise ValueError(f"{where} has no rewards, although model.reward or the setting's `provides` says so")
        return None, rows
    if not setting.has_rewards:
        raise ValueError(
            f"{where} has rewards, although model.reward is not set and `provides` does not name 'reward': name it "
            "there, or return None in their place"
        )
    if isinstance(rewards, Tensor) and rewards.shape == (count,):
        rewards = rewards.tolist()
    if not isinstance(rewards, list | tuple) or len(rewards) != count:
        raise ValueError(f"{where}: rewards are {_kind(rewards)}; they have to be {count}, one for each trajectory")
    # 3. numbers
    values = torch.full((count,), torch.nan)
    for i, (reward, row) in enumerate(zip(rewards, rows, strict=True)):
        if reward is not None:
            value = as_number(reward)
            if value is None:
                raise ValueError(
                    f"{where}: the reward of the completion {quoted(row.get('completion'))} of the row with the prompt "
                    f"{quoted(row.get('prompt'))} is {described(reward)}; it has to be a finite number, or None in a "
                    "list where it abstains"
                )
            values[i] = value
    return values, rows


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{quoted(value)}, of type {type(value).__name__}"
