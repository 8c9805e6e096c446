"""Caches of rows that are being written: keys and values, in place.

Shape legend: n rows still being written, B trajectories, U different prompts, M most rows of one prompt, G key heads,
R query heads for each, S size of a head, P prompt width (left padded).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class RowCache(Cache):
    """Keys and values of n rows, in tensors that are allocated once for the whole rollout.

    All rows write into the same column; a row's prompt ends where writing begins. Reads return a window: the rows that
    are left, from the first column that any of them has.

    Args:
        read: the cache of U prompts ``[U, heads, P, size]`` per layer.
        row: ``[B]`` whose prompt each row begins with.
        attended: ``[U, P]`` the columns of each prompt that are no padding.
        horizon: columns to be written at most.
        share: leave the prompts where they are, in `prompts`, instead of copying one to each of its rows.
    """

    def __init__(self, read: Cache, row: Tensor, attended: Tensor, horizon: int, share: bool = False) -> None:
        self.prompts = SharedPrompts(read, row, attended) if share else None
        if share:
            # rows hold no prompt then, and begin in column 0
            attended = attended[:, :0]
        self.rows, width = len(row), attended.shape[1]
        self.column = width
        self._attended = F.pad(attended[row], (0, horizon), value=True)
        self._parts = [_Rows(self, layer, row, width, width + horizon) for layer in read.layers]
        super().__init__(layers=[*self._parts])
        self._narrow()

    def _narrow(self) -> None:
        attended = self._attended[: self.rows]
        self.first = int(attended.any(0).int().argmax())
        self._padded = not bool(attended[:, self.first :].all())

    def attention_mask(self) -> Tensor | None:
        """Returns the mask ``[n, columns]`` for a forward pass of the next column; None where there is no padding."""
        return self._attended[: self.rows, self.first : self.column + 1] if self._padded else None

    def attended(self, place: int) -> Tensor:
        """Returns the columns ``[L]`` that were read of a row."""
        return self._attended[place, : self.column].nonzero().squeeze(1)

    def rows_of(self) -> list[_Rows]:
        """Returns the layers, whose keys and values begin with the rows that are left."""
        return self._parts

    def advance(self) -> None:
        """Moves to the next column."""
        self.column += 1

    def keep(self, order: Tensor) -> None:
        """Moves row ``order[i] >= i`` to row i, for n' rows; the others are dropped."""
        if self.prompts is not None:
            self.prompts.keep(order)
        self.rows = len(order)
        moved = (order != torch.arange(self.rows, device=order.device)).nonzero().squeeze(1)
        if len(moved):
            self._attended[moved] = self._attended[order[moved]]
            for layer in self._parts:
                layer.move(order[moved], moved)
        self._narrow()


class _Rows(DynamicLayer):
    """Layer of a `RowCache`."""

    keys: Tensor
    values: Tensor

    def __init__(self, owner: RowCache, read: Any, row: Tensor, width: int, columns: int) -> None:
        super().__init__()
        self.owner, self.is_initialized = owner, True
        self.dtype, self.device = read.keys.dtype, read.keys.device
        self.keys, self.values = (self._spread(tensor, row, width, columns) for tensor in (read.keys, read.values))

    @staticmethod
    def _spread(read: Tensor, row: Tensor, width: int, columns: int) -> Tensor:
        _, heads, _, size = read.shape
        # not filled: a column is written before it is read
        spread = read.new_empty(len(row), heads, columns, size)
        if width:
            spread[:, :, :width] = read[row]
        return spread

    def move(self, source: Tensor, target: Tensor) -> None:
        for tensor in (self.keys, self.values):
            tensor[target, :, self.owner.first : self.owner.column] = tensor[
                source, :, self.owner.first : self.owner.column
            ]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        owner, windows = self.owner, []
        for tensor, new in ((self.keys, key_states), (self.values, value_states)):
            tensor[: owner.rows, :, owner.column : owner.column + 1] = new
            # a view: nothing is copied at a step
            windows.append(tensor[: owner.rows, :, owner.first : owner.column + 1])
        return windows[0], windows[1]

    def get_seq_length(self) -> int:
        return self.owner.column - self.owner.first

    # transformers makes its mask by this and the length
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


class SharedPrompts:
    """Keys and values of U prompts, each read by all rows that begin with it, and not copied for any of them.

    Args:
        read: the cache of U prompts ``[U, G, P, S]`` per layer.
        row: ``[n]`` whose prompt each row begins with.
        attended: ``[U, P]`` the columns of each prompt that are no padding.
    """

    def __init__(self, read: Cache, row: Tensor, attended: Tensor) -> None:
        layers: list[Any] = list(read.layers)
        self._layers: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in layers]
        self._row, self._attended = row, attended
        self._place()

    def _place(self) -> None:
        """Indexes the rows of each prompt, and drops prompts without rows."""
        left, self._row = self._row.unique(return_inverse=True)
        if len(left) < len(self._attended):
            self._attended = self._attended[left]
            self._layers = [(keys[left], values[left]) for keys, values in self._layers]
        count = self._row.bincount()
        self._most = int(count.max())
        order = self._row.argsort(stable=True)
        start = (count.cumsum(0) - count)[self._row[order]]
        slot = torch.empty_like(order).index_put_((order,), torch.arange(len(order), device=order.device) - start)
        self._slot = self._row * self._most + slot
        # as a rollout begins: then rows are grouped by a view, and nothing is gathered
        self._in_order = len(self._row) == len(left) * self._most and bool((self._slot.diff() == 1).all())
        self._bias = None if bool(self._attended.all()) else score_bias(self._attended)

    def keep(self, order: Tensor) -> None:
        """Moves row ``order[i]`` to row i; the others are dropped."""
        self._row = self._row[order]
        self._place()

    def scores(self, queries: Tensor, layer: int) -> Tensor:
        """Computes scores ``[n, G, R, P]`` of queries ``[n, G, R, S]``; -inf where the prompt is padded."""
        keys = self._layers[layer][0]
        scores = self._together(queries.to(keys.dtype)) @ keys.transpose(2, 3)
        return self._apart(scores if self._bias is None else scores + self._bias)

    def read(self, shares: Tensor, layer: int) -> Tensor:
        """Sums the values with these shares ``[n, G, R, P]``: ``[n, G, R, S]``."""
        return self._apart(self._together(shares) @ self._layers[layer][1])

    def _together(self, rows: Tensor) -> Tensor:
        """Gathers rows by prompt: ``[n, G, R, X]`` → ``[U, G, M × R, X]``."""
        _, heads, each, size = rows.shape
        slots = rows
        if not self._in_order:
            slots = rows.new_zeros(len(self._attended) * self._most, heads, each, size).index_copy_(0, self._slot, rows)
        return slots.view(-1, self._most, heads, each, size).transpose(1, 2).reshape(-1, heads, self._most * each, size)

    def _apart(self, gathered: Tensor) -> Tensor:
        """Scatters prompts to rows: ``[U, G, M × R, X]`` → ``[n, G, R, X]``."""
        prompts, heads, _, size = gathered.shape
        slots = gathered.view(prompts, heads, self._most, -1, size).transpose(1, 2).flatten(0, 1)
        return slots if self._in_order else slots[self._slot]


def score_bias(attended: Tensor) -> Tensor:
    """Builds a bias ``[n, 1, 1, L]`` of scores: -inf in columns that are not ``attended [n, L]``."""
    return torch.zeros(attended.shape, device=attended.device).masked_fill_(~attended, -torch.inf)[:, None, None]
