"""TeacherReading: what a teacher makes of each step of some rollouts, to be looked at.

Shape legend: n steps of an open chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .distribution.chunk import CategoricalChunk
from .objective import OpenSteps
from .setting import Setting
from .trajectory import Trajectories


class TeacherReading:
    """Signal that keeps, of each step that it reads, what the teacher makes of the action and of others.

    Args:
        signal: whose values ``[n]`` it returns.
        count: of the likeliest steps; 0: nothing is kept.
    """

    def __init__(self, signal: Callable[[OpenSteps], Tensor], count: int) -> None:
        self.signal, self.count = signal, count
        self.taken: list[Tensor] = []
        self.best: list[tuple[Tensor, Tensor]] = []

    def __call__(self, steps: OpenSteps) -> Tensor:
        if self.count and isinstance(steps.teacher, CategoricalChunk):
            known, unknown = steps.teacher.known()[0], ~steps.knows(steps.stream or "")
            values, ids = known.topk(min(self.count, known.shape[-1]))
            taken = known.gather(-1, steps.action[:, None]).squeeze(-1)
            self.taken.append(taken.masked_fill(unknown, torch.nan).cpu())
            self.best.append((values.masked_fill(unknown[:, None], torch.nan).cpu(), ids.cpu()))
        return self.signal(steps)

    def of(self, setting: Setting, shown: Trajectories) -> tuple[list[Any] | None, list[Any] | None]:
        """Spreads what was kept over trajectories.

        Returns:
            Log-probs of the actions, a list for each trajectory, and for each of its steps ``[text, log-prob]`` of the
            likeliest; None where the teacher does not tell. None for both where nothing was kept, and for the likeliest
            where steps can't be read.
        """
        if not self.taken:
            return None, None
        # chunks are read in the order of the trained steps
        lengths = shown.mask.sum(1).tolist()
        taken = torch.cat(self.taken).split(lengths)
        values, ids = (torch.cat(pieces) for pieces in zip(*self.best, strict=True))
        texts = []
        for column in ids.T:
            actions = shown.actions.clone()
            actions[shown.mask] = column.to(actions)
            texts.append(setting.decode_steps(dataclasses.replace(shown, actions=actions)))
        log_probs = [[_plain(value) for value in row.tolist()] for row in taken]
        spelled = [text for text in texts if text is not None]
        if not spelled:  # steps that can't be read
            return log_probs, None
        likeliest = [
            [
                None if row[0] != row[0] else [[spelled[k][i][t], _plain(value)] for k, value in enumerate(row)]
                for t, row in enumerate(rows.tolist())
            ]
            for i, rows in enumerate(values.split(lengths))
        ]
        return log_probs, likeliest


def _plain(value: float) -> float | None:
    """Rounds to what is looked at; None for NaN, which is no JSON."""
    return None if value != value else round(value, 4)
