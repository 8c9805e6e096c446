"""The default rollout engine: a loop over the model's own forward pass, with a cache that shrinks as rows end.

Shape legend: B trajectories, U different prompts, n rows still being written, P prompt width (left padded), T horizon,
L = P + T columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ...distribution import Head
from ...rollout import Rollout
from ...sharding import is_sharded
from ...teacher import Policy, evaluating
from .draw import draw, uniforms
from .engine import Generate, Prompts, RolloutEngine
from .models import bare

READS = {"input_ids", "attention_mask", "position_ids", "past_key_values"}


class DecodeLoop(RolloutEngine):
    """Every different prompt is read once, rows that have ended leave the batch, nothing is copied per step.

    Serves decoders all of whose layers keep the keys and values of every token (no sliding window, no recurrent
    state), whose weights are not sharded. All others are handed to `Generate`.
    """

    def refusal(self, policy: Policy) -> str | None:
        model = bare(policy.model)
        if model.config.is_encoder_decoder:
            return "an encoder and a decoder"
        if is_sharded(model):
            return "sharded weights"  # ranks would have to end together
        if not inspect.signature(model.base_model.forward).parameters.keys() >= READS:
            return "a forward pass without position ids or cache"
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        if kinds != {DynamicLayer} or getattr(model, "_is_stateful", False):
            return "layers that keep other things than the keys and values of every token"
        return None

    def write(
        self, policy: Policy, head: Head, prompts: Prompts, rollout: Rollout, seeds: list[int], eos: list[int], pad: int
    ) -> tuple[Tensor, Tensor]:
        if self.refusal(policy) is not None:
            return Generate().write(policy, head, prompts, rollout, seeds, eos, pad)
        model = bare(policy.model)
        with torch.no_grad(), evaluating(model):
            return _write(model, head, prompts, rollout, seeds, eos, pad)


def _write(
    model: Any, head: Head, prompts: Prompts, rollout: Rollout, seeds: list[int], eos: list[int], pad: int
) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    first, prompt_of = prompts.distinct
    inputs = prompts.inputs(first, device)
    position = model._prepare_position_ids_for_generation(inputs["input_ids"], inputs)
    read = DynamicCache(config=model.config)
    seen = inputs["attention_mask"].bool()
    hidden = model.base_model(**inputs, position_ids=position, past_key_values=read, use_cache=True)[0][:, -1]

    row = torch.tensor(prompt_of, device=device)
    cache = RowCache(read, row, seen, rollout.horizon)
    del read, inputs
    project = projection(head, hidden, len(row))
    logits = project(hidden)[row]
    position = position[..., -1:].expand(*position.shape[:-2], len(seen), 1)[..., row, :] + 1

    stop = torch.tensor(eos, device=device)
    uniform = uniforms(seeds, rollout.horizon).to(device)
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
            order = closed_up(going, left)
            cache.keep(order)
            chosen, live, position = chosen[order], live[order], position[..., order, :]
        hidden = model.base_model(
            input_ids=chosen[:, None],
            attention_mask=cache.attention_mask(),
            position_ids=position + step,
            past_key_values=cache,
            use_cache=True,
        )[0][:, -1]
        cache.advance()
        logits = project(hidden)
    return tokens[:, : step + 1], log_probs[:, : step + 1]


def closed_up(going: Tensor, left: int) -> Tensor:
    """``[left]`` which row each row becomes, where those not going ``[n]`` leave: the last ones fill the gaps."""
    order = torch.arange(left, device=going.device)
    order[~going[:left]] = left + going[left:].nonzero().squeeze(1)
    return order


class RowCache(Cache):
    """Keys and values of n rows, in tensors made once for the whole rollout.

    All rows write into the same column; a row's prompt ends where writing begins. What is read is a window: the rows
    that are left, from the first column that any of them has.

    Args:
        read: the cache of U prompts ``[U, heads, P, size]`` per layer.
        row: ``[B]`` whose prompt each row begins with.
        seen: ``[U, P]`` the columns of each prompt that are no padding.
        horizon: columns to be written at most.
    """

    def __init__(self, read: Cache, row: Tensor, seen: Tensor, horizon: int) -> None:
        self.rows, width = len(row), seen.shape[1]
        self.column = width
        self._seen = F.pad(seen[row], (0, horizon), value=True)
        self._parts = [_Rows(self, layer, row, width + horizon) for layer in read.layers]
        super().__init__(layers=[*self._parts])
        self._narrow()

    def _narrow(self) -> None:
        seen = self._seen[: self.rows]
        self.first = int(seen.any(0).int().argmax())
        self._padded = not bool(seen[:, self.first :].all())

    def attention_mask(self) -> Tensor | None:
        """``[n, columns]`` for a forward pass of the next column; None where there is no padding."""
        return self._seen[: self.rows, self.first : self.column + 1] if self._padded else None

    def advance(self) -> None:
        self.column += 1

    def keep(self, order: Tensor) -> None:
        """Row i becomes what row ``order[i] >= i`` was, for n' rows; the others are forgotten."""
        self.rows = len(order)
        moved = (order != torch.arange(self.rows, device=order.device)).nonzero().squeeze(1)
        if len(moved):
            self._seen[moved] = self._seen[order[moved]]
            for layer in self._parts:
                layer.move(order[moved], moved)
        self._narrow()


class _Rows(DynamicLayer):
    keys: Tensor
    values: Tensor

    def __init__(self, owner: RowCache, read: Any, row: Tensor, columns: int) -> None:
        super().__init__()
        self.owner, self.is_initialized = owner, True
        self.dtype, self.device = read.keys.dtype, read.keys.device
        self.keys, self.values = (self._spread(part, row, columns) for part in (read.keys, read.values))

    @staticmethod
    def _spread(read: Tensor, row: Tensor, columns: int) -> Tensor:
        _, heads, width, size = read.shape
        made = read.new_empty(len(row), heads, columns, size)
        made[:, :, :width] = read[row]
        return made

    def move(self, source: Tensor, target: Tensor) -> None:
        for part in (self.keys, self.values):
            part[target, :, self.owner.first : self.owner.column] = part[
                source, :, self.owner.first : self.owner.column
            ]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        own, parts = self.owner, []
        for part, new in ((self.keys, key_states), (self.values, value_states)):
            part[: own.rows, :, own.column : own.column + 1] = new
            parts.append(part[: own.rows, :, own.first : own.column + 1])
        return parts[0], parts[1]

    def get_seq_length(self) -> int:
        return self.owner.column - self.owner.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def projection(head: Head, hidden: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """The head, for many passes of up to so many rows of hidden states like these: cast once, and on a CPU packed once
    (a copy of its float32 weights for the time of the rollout)."""
    if not head.is_linear:
        return head
    device = hidden.device.type
    weight, bias = head.linear(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
    if device == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        return lambda h: head.finish(torch.ops.mkldnn._linear_pointwise(h, packed, bias, "none", [], ""))
    return lambda h: head.finish(F.linear(h.to(weight.dtype), weight, bias))
