"""The default rollout engine: a loop over the model's own forward pass, with a cache that shrinks as rows end.

Shape legend: B trajectories, U different prompts, n rows still being written, P prompt width (left padded), T horizon,
L = P + T columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ....distribution import Head
from ....policy import Policy, evaluating
from ....rollout_settings import Rollout
from ..models import bare, cache_name, problem_with_cache
from ..passes import pass_limits
from ..prefix import read_prompts
from .cache import RowCache
from .draw import draw, uniforms
from .engine import Prompts, RolloutEngine
from .generate import Generate
from .layers import PackedDecoder, packed_linear
from .trial import shares_prefixes


class DecodeLoop(RolloutEngine):
    """Engine that reads every different prompt once, drops rows that have ended, and copies nothing per step.

    Serves decoders all of whose layers keep the keys and values of every token (no sliding window, no recurrent
    state), whose weights are not sharded. All others are handed to `Generate`.

    Args:
        packed: on a CPU, decode layers of a known kind by `PackedDecoder` (for each rollout a copy of their weights)
            instead of the model's own forward pass, with prompts kept once for all trajectories that begin with them.
    """

    runs_the_model = True

    def __init__(self, packed: bool = True) -> None:
        self.packed = packed

    def refusal(self, policy: Policy) -> str | None:
        return problem_with_cache(bare(policy.model))

    def write(
        self, policy: Policy, head: Head, prompts: Prompts, rollout: Rollout, seeds: list[int], eos: list[int], pad: int
    ) -> tuple[Tensor, Tensor]:
        if self.refusal(policy) is not None:
            return Generate().write(policy, head, prompts, rollout, seeds, eos, pad)
        model = bare(policy.model)
        with torch.no_grad(), evaluating(model):
            packed = self.packed and PackedDecoder.refusal(model) is None
            return _write(
                model, head, prompts, rollout, seeds, eos, pad, packed, partial(shares_prefixes, policy, head)
            )


def _write(
    model: Any,
    head: Head,
    prompts: Prompts,
    rollout: Rollout,
    seeds: list[int],
    eos: list[int],
    pad: int,
    packed: bool,
    shares: Callable[[], bool],
) -> tuple[Tensor, Tensor]:
    # 1. read every different prompt once
    device = next(model.parameters()).device
    first, prompt_of = prompts.distinct
    inputs = prompts.inputs(first, device)
    # transformers' own, since some models have several axes (Qwen-VL)
    position = model._prepare_position_ids_for_generation(inputs["input_ids"], inputs)
    attended = inputs["attention_mask"].bool()
    if inputs.keys() == {"input_ids", "attention_mask"}:
        read, hidden = read_prompts(model, inputs, shares, *pass_limits(device, None))
    else:
        read = DynamicCache(config=model.config)
        cached = {str(cache_name(model)): read}
        # left padded: the last column has the last token of every prompt
        hidden = model.base_model(**inputs, position_ids=position, **cached, use_cache=True)[0][:, -1]
        del cached

    # 2. one row per trajectory: its prompt's cache, position and next logits
    row = torch.tensor(prompt_of, device=device)
    body = PackedDecoder(model, len(row)) if packed else partial(own_forward, model)
    # the model's own forward pass can't read prompts that rows share
    cache = RowCache(read, row, attended, rollout.horizon, share=packed and len(attended) < len(row))
    # no second copy of the prompts' keys and values while rows are written
    del read, inputs
    project = projection(head, hidden, len(row))
    logits = project(hidden)[row]
    position = position[..., -1:].expand(*position.shape[:-2], len(attended), 1)[..., row, :] + 1

    # 3. draw step by step; rows that ended leave, so that a pass is as small as possible
    stop = torch.tensor(eos, device=device)
    # what goes on behind tokens that were written before goes on with its own draws
    uniform = uniforms(seeds, prompts.written + rollout.horizon)[:, prompts.written :].to(device)
    tokens = torch.full((len(seeds), rollout.horizon), pad, device=device)
    log_probs = torch.zeros(tokens.shape, dtype=torch.float32, device=device)
    live = torch.arange(len(seeds), device=device)
    for step in range(rollout.horizon):
        chosen, log_prob = draw(logits, uniform[live, step], rollout)
        tokens[live, step], log_probs[live, step] = chosen, log_prob.float()
        going = ~torch.isin(chosen, stop)
        left = int(going.sum())
        if not left or step + 1 == rollout.horizon:
            break
        if left < len(live):
            order = compact_rows(going, left)
            cache.keep(order)
            chosen, live, position = chosen[order], live[order], position[..., order, :]
        logits = project(body(chosen, position + step, cache))
        cache.advance()
    return tokens[:, : step + 1], log_probs[:, : step + 1]


def own_forward(model: Any, tokens: Tensor, position: Tensor, cache: RowCache) -> Tensor:
    """Computes hidden states ``[n, H]`` of tokens ``[n]`` by the model itself: the reference for `PackedDecoder`."""
    hidden: Tensor = model.base_model(
        input_ids=tokens[:, None],
        attention_mask=cache.attention_mask(),
        position_ids=position,
        use_cache=True,
        **{str(cache_name(model)): cache},
    )[0]
    return hidden[:, -1]


def compact_rows(going: Tensor, left: int) -> Tensor:
    """Returns the source ``[left]`` of each row where those not ``going [n]`` leave: the last ones fill the gaps."""
    order = torch.arange(left, device=going.device)
    order[~going[:left]] = left + going[left:].nonzero().squeeze(1)
    return order


def projection(head: Head, hidden: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """Prepares the head for many passes of up to so many rows: cast once, and on a CPU packed once.

    That is a copy of its weights, for the time of the rollout.
    """
    if not head.is_linear:
        return head
    device = hidden.device.type
    weight, bias = head.linear(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
    linear = packed_linear(weight, bias, rows)
    return lambda h: head.finish(linear(h))
