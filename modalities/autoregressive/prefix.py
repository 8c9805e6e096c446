"""Prefixes that rows of a micro-batch share: found by their tokens, read once, and continued from keys and values.

Shape legend: B rows, W columns, n rows of a pass, H hidden size. All rows begin in the first column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ...noise import noise
from .models import cache_name, problem_with_cache, rope_kinds
from .passes import body, left_align, passes, read


@dataclass(frozen=True)
class Prefix:
    """Columns that some rows share, behind a prefix that they share with more.

    Attributes:
        rows: indices of the rows.
        start, stop: its columns.
        longer: prefixes that begin at ``stop``, each of some of the rows; no row is in two of them.
    """

    rows: Tensor
    start: int = 0
    stop: int = 0
    longer: tuple[Prefix, ...] = ()

    @property
    def rest(self) -> Tensor:
        """Rows that share nothing further."""
        further = torch.cat([self.rows[:0], *(prefix.rows for prefix in self.longer)])
        return self.rows[~torch.isin(self.rows, further)]


def shared_prefixes(ids: Tensor, limit: Tensor, cost: int) -> Prefix:
    """Finds what rows of token ids ``[B, W]`` share, at any depth: of all rows, then of some of them.

    Args:
        ids: on the CPU.
        limit: ``[B]`` columns of each row that may be shared. Behind them are the tokens whose hidden states are
            wanted, so that those of a prefix are not.
        cost: of a forward pass, in tokens. A prefix takes one of its own, and parts its rows from others with which
            they could have shared one, so it has to save more than two.

    Returns:
        The empty prefix of all rows, and in it what they share.
    """

    def longer(rows: Tensor, start: int, column: int) -> tuple[Prefix, ...]:
        """Lists prefixes behind ``start`` of rows that are equal up to ``column``."""
        prefixes: list[Prefix] = []
        rows = rows[limit[rows] > column]
        for token in ids[rows, column].unique():
            alike = rows[ids[rows, column] == token]
            if len(alike) > 1:
                compared = ids[alike, column : int(limit[alike].min())]
                stop = column + int((compared == compared[0]).all(0).cumprod(0).sum())
                if (len(alike) - 1) * (stop - start) > 2 * cost:
                    prefixes.append(Prefix(alike, start, stop, longer(alike, stop, stop)))
                else:
                    prefixes += longer(alike, start, stop)
        return tuple(prefixes)

    rows = torch.arange(len(ids))
    return Prefix(rows, longer=longer(rows, 0, 0))


def read_once(prefix: Prefix) -> Iterator[tuple[int, int]]:
    """Yields the first column, and the one behind the last, of all prefixes that are read for several rows at once."""
    if prefix.stop > prefix.start:
        yield prefix.start, prefix.stop
    for longer in prefix.longer:
        yield from read_once(longer)


def problem_with_prefixes(model: Any) -> str | None:
    """Explains why a model can't go on behind a prefix that was read before, going by its kind; None: it may."""
    if kinds := rope_kinds(model):
        return f"rope_type {kinds[0]}, which depends on the longest row"
    return problem_with_cache(model)


def reads_whole_rows(model: Any) -> bool:
    """Tells whether training mode makes whole rows necessary now.

    Recomputed layers have no cache in transformers, and dropout is drawn for each row.
    """
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return bool(model.training and (recomputes or noise(model) > 0))


def read_rows(
    model: Any,
    inputs: dict[str, Tensor],
    length: Tensor,
    prefix: Prefix,
    most: float,
    cost: int,
    layers: Sequence[int] = (),
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Reads every shared prefix once, and what rows have behind it in as few passes as possible.

    Gradients flow through the keys and values of a prefix.

    Args:
        model: a transformers model; one for which `problem_with_prefixes` is None where anything is shared.
        inputs: ``[B, W]`` each.
        length: ``[B]`` tokens of each row.
        prefix: as `shared_prefixes` returns it, or ``Prefix`` of all rows alone, in which nothing is shared.
        most: tokens of a pass, those before it not counted.
        cost: of a pass, in tokens.
        layers: whose hidden states are read, too (`body`).

    Yields:
        Of every pass its rows, its first column, and its hidden states ``[n, width of the pass, (1 + L) × H]``.
    """

    for rows, start, stop, before in _passes(model, inputs, length, prefix, most, cost):
        behind = _columns(inputs, rows, start, stop)
        if before is None:
            yield rows, start, read(model, behind, layers)
        else:
            yield rows, start, _read(model, behind, _behind(before, len(rows), _Passing), layers)


def read_prompts(
    model: Any, prompts: dict[str, Tensor], shares: Callable[[], bool], most: float, cost: int
) -> tuple[Cache, Tensor]:
    """Reads prompts as `read_rows` does, without gradient, and keeps what they will be continued from.

    Args:
        model: a transformers model.
        prompts: ``input_ids`` and ``attention_mask [B, P]``, left padded.
        shares: tells whether what they share is read once; asked where they share something.
        most, cost: of a pass, as in `read_rows`.

    Returns:
        Keys and values of all columns, with anything where there is padding; the hidden state ``[B, H]`` of each
        prompt's last token.
    """
    device, width = prompts["input_ids"].device, prompts["input_ids"].shape[1]
    last = prompts["attention_mask"].sum(1) - 1
    ids = left_align(prompts)["input_ids"]
    inputs = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1], device=device).expand_as(ids)}
    prefix = shared_prefixes(ids.cpu(), last.cpu(), cost)
    if prefix.longer and not shares():
        prefix = Prefix(prefix.rows)
    parts, hidden, order = [], [], []
    layers: list[Any] = []
    for rows, start, stop, before in _passes(model, inputs, last.cpu() + 1, prefix, most, cost):
        cache = DynamicCache(config=model.config) if before is None else _behind(before, len(rows), DynamicLayer)
        states, end = _read(model, _columns(inputs, rows, start, stop), cache), last[rows.to(device)]
        hidden.append(states[torch.arange(len(rows), device=device), end - start])
        layers = list(cache.layers)
        # back to the right, where all rows go on in the same column
        column = (torch.arange(width, device=device) + 1 - width + end[:, None]).clamp(min=0)[:, None, :, None]
        parts.append([[t.take_along_dim(column, 2) for t in (layer.keys, layer.values)] for layer in layers])
        order.append(rows)
    place = torch.cat(order).argsort().to(device)
    for layer, *of_passes in zip(layers, *parts, strict=True):
        layer.keys, layer.values = (torch.cat(tensors)[place] for tensors in zip(*of_passes, strict=True))
    return Cache(layers=layers), torch.cat(hidden)[place]


def _columns(inputs: dict[str, Tensor], rows: Tensor, start: int, stop: int) -> dict[str, Tensor]:
    return {name: tensor[rows.to(tensor.device), start:stop] for name, tensor in inputs.items()}


def _passes(
    model: Any,
    inputs: dict[str, Tensor],
    length: Tensor,
    prefix: Prefix,
    most: float,
    cost: int,
    before: Cache | None = None,
) -> Iterator[tuple[Tensor, int, int, Cache | None]]:
    """Lists passes behind a prefix: rows, the first column, the one behind the last, and the prefix, which was read."""
    if prefix.stop > prefix.start:
        grown = DynamicCache(config=model.config) if before is None else _behind(before, 1, DynamicLayer)
        _read(model, _columns(inputs, prefix.rows[:1], prefix.start, prefix.stop), grown)
        before = grown
    for longer in prefix.longer:
        yield from _passes(model, inputs, length, longer, most, cost, before)
    rest = prefix.rest
    for index in passes(length[rest] - prefix.stop, most, cost):
        rows = rest[index]
        yield rows, prefix.stop, int(length[rows].max()), before


def _read(model: Any, inputs: dict[str, Tensor], cache: Cache, layers: Sequence[int] = ()) -> Tensor:
    """Computes hidden states of inputs behind what is in a cache, as `body` does."""
    return body(model, layers, **inputs, **{str(cache_name(model)): cache}, use_cache=True)


def _behind(before: Cache, rows: int, kind: type[DynamicLayer]) -> Cache:
    """Builds a cache of rows that all begin with a prefix, which none of them has a copy of."""
    given: list[Any] = list(before.layers)
    layers: list[Any] = []
    for layer in given:
        behind = kind()
        behind.keys, behind.values = (t.expand(rows, -1, -1, -1) for t in (layer.keys, layer.values))
        # or the layer would begin with empty keys at its first update
        behind.dtype, behind.device, behind.is_initialized = layer.keys.dtype, layer.keys.device, True
        layers.append(behind)
    return Cache(layers=layers)


class _Passing(DynamicLayer):
    """Layer that keeps nothing of the rows that go on: their keys and values are gone with their attention."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)
