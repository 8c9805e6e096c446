"""Lines: trajectories while they are written and observed, turn by turn.

Shape legend: B trajectories, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...trajectory import Example, Trajectories
from .engines import Prompts
from .observing import Heard

TURN, OF_TURNS = "turn", ("reward", "read", "failures")
"""Channels: the turn of each step, which parts ask for by this name in ``needs``; and, in an environment, at the last
step of each turn its reward, the tokens that were read for it, and whether the environment failed (0 elsewhere)."""
WRITTEN = "written"
"""Channel of recorded turns: which of their steps the assistant wrote."""


@dataclass
class Line:
    """One trajectory that is written and observed in turns: values of its steps so far, by what they become."""

    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    channels: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in (TURN, *OF_TURNS)})
    observed: list[dict[str, Any]] = field(default_factory=list)
    turn: int = 0
    stopped: bool = False

    def hold(self, begun: Trajectories, row: int) -> list[list[int]]:
        """Begins with the steps that a row of others holds, which are not trained; returns the ids of its turns."""
        length = int(begun.extent[row])
        ids, turns = begun.actions[row, :length].tolist(), begun.channels[TURN][row, :length].tolist()
        self.add(ids)
        self.observed = [*begun.observed[row]] if begun.observed is not None else []
        self.channels[TURN], self.turn = turns, turns[-1] if turns else 0
        steps = list(zip(ids, begun.channels[WRITTEN][row].tolist(), turns, strict=False))
        return [[i for i, written, of in steps if written and of == number] for number in range(self.turn)]

    def add(self, ids: list[int], log_probs: list[float] | None = None) -> None:
        """Adds steps of the turn: written ones, with their log-probs, or observed ones."""
        self.ids += ids
        self.own += [log_probs is not None] * len(ids)
        self.log_probs += log_probs if log_probs is not None else [0.0] * len(ids)
        for name, values in self.channels.items():
            values += [self.turn if name == TURN else 0] * len(ids)

    def hear(self, heard: Heard) -> None:
        """Adds an observation of the turn."""
        self.observed += [value | {"at": len(self.ids) + value["at"]} for value in heard.values]
        self.add(heard.ids)

    def written(self) -> list[int]:
        """Lists the ids that were written in the turn."""
        steps = zip(self.ids, self.own, self.channels[TURN], strict=True)
        return [i for i, own, of in steps if own and of == self.turn]


def joined(prompts: Prompts, examples: Sequence[Example], lines: Sequence[Line], padding: int) -> Trajectories:
    """Joins lines to trajectories; ``padding``: the id behind their ends."""
    width = max(len(line.ids) for line in lines)

    def padded(values: list[list[Any]], missing: float, kind: torch.dtype) -> Tensor:
        return torch.tensor([row + [missing] * (width - len(row)) for row in values]).to(kind)

    return Trajectories(
        observation=prompts.tokens,
        actions=padded([line.ids for line in lines], padding, torch.long),
        mask=padded([line.own for line in lines], 0, torch.bool),
        examples=[*examples],
        stopped=torch.tensor([line.stopped for line in lines]),
        observed=[line.observed for line in lines] if any(line.observed for line in lines) else None,
        behavior_log_probs=padded([line.log_probs for line in lines], 0.0, torch.float32),
        channels={
            name: padded([line.channels[name] for line in lines], 0, torch.long if name == TURN else torch.float32)
            for name in (TURN, *OF_TURNS)
        },
    )
