"""What signals, targets and weights read: the trained steps of a micro-batch, whole or one chunk of them.

Shape legend: N trained steps of a micro-batch, n of a chunk, B trajectories.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..distribution import CategoricalChunk, Gaussian
from ..trajectory import Trajectories

# What a part may read of the distributions themselves; "teacher" stands for the term's own teacher.
STATISTICS = ("student_entropy", "teacher_entropy", "student_log_prob", "teacher_log_prob", "teacher_confidence")


@dataclass
class Steps:
    """The trained steps of a micro-batch, flattened to N, and what is known at each.

    Distributions are there only while a chunk is open; the statistics that a part of wider scope declared are there
    for all N steps (``statistics``), otherwise they are computed from the open chunk.
    """

    trajectories: Trajectories
    index: Tensor  # [N] into the flattened B × T
    student: CategoricalChunk | Gaussian | None = None
    streams: dict[str, CategoricalChunk | Gaussian] = field(default_factory=dict)
    without_view: dict[str, CategoricalChunk | Gaussian] = field(default_factory=dict)  # for the log
    available: dict[str, Tensor] = field(default_factory=dict)  # [B] bool, by teacher
    stream: str | None = None  # what "teacher" stands for: `Term.stream`
    target: CategoricalChunk | Gaussian | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)
    # values of parts of wider scope, by the part's id and the stream that it reads
    parts: dict[tuple[int, str | None], Tensor] = field(default_factory=dict)
    everywhere: Callable[[str], Tensor] | None = None
    abstained: Tensor | None = None  # [B] bool: whose reward abstains, which parts read as 0

    @classmethod
    def of(cls, trajectories: Trajectories, available: dict[str, Tensor] | None = None) -> Steps:
        index = trajectories.mask.flatten().nonzero().squeeze(-1)
        known = trajectories.without_abstentions()
        return cls(known, index, available=available or {}, abstained=trajectories.abstained)

    def __len__(self) -> int:
        return len(self.index)

    def at(self, states: slice | Tensor, **changes: Any) -> Steps:
        """Some of the steps; ``changes`` sets the open chunk's distributions."""
        return Steps(
            self.trajectories,
            self.index[states],
            available=self.available,
            statistics={name: values[states] for name, values in self.statistics.items()},
            parts={part: values[states] for part, values in self.parts.items()},
            everywhere=self.everywhere,
            abstained=self.abstained,
            **changes,
        )

    def for_term(self, stream: str | None, target: CategoricalChunk | Gaussian | None = None) -> Steps:
        """The same steps as one term sees them: what "teacher" stands for."""
        return replace(self, stream=stream, target=target)

    @property
    def teacher(self) -> Any:
        """The distribution that the term compares the student with (its teacher's, after the target)."""
        if self.target is None:
            raise RuntimeError("this term has no teacher; a signal that reads one must declare it in `needs`")
        return self.target

    @cached_property
    def trajectory(self) -> Tensor:
        """``[N]`` which trajectory a step belongs to."""
        return self.index // self.trajectories.mask.shape[1]

    @cached_property
    def position(self) -> Tensor:
        """``[N]`` how many steps came before it in its trajectory."""
        return self.index % self.trajectories.mask.shape[1]

    @cached_property
    def action(self) -> Tensor:
        """``[N, ...]``"""
        return self.trajectories.actions.flatten(0, 1)[self.index]

    @cached_property
    def behavior_log_prob(self) -> Tensor:
        """``[N]``"""
        return self.trajectories.behavior_log_probs.flatten()[self.index]

    def channel(self, name: str) -> Tensor:
        """``[N, ...]`` what the setting knows of each step, such as the ``digits`` that a token writes."""
        return self.trajectories.channels[name].flatten(0, 1)[self.index]

    def per_trajectory(self, values: Tensor) -> Tensor:
        """``[B]`` → ``[N]``: each step takes its trajectory's value."""
        return values[self.trajectory]

    def part(self, part: Callable[[Steps], Tensor]) -> Tensor:
        """``[n]`` the value of an advantage or a weight: looked up if its scope is wider than a step."""
        key = id(part), self.stream
        return self.parts[key] if key in self.parts else part(self)

    def key(self, name: str) -> str:
        """Under which a statistic is kept: a teacher's under the stream's name."""
        return f"{self.stream}/{name}" if name.startswith("teacher") else name

    def statistic(self, name: str) -> Tensor:
        """``[N]``, without gradient: one of `STATISTICS`, for the term's own stream."""
        key = self.key(name)
        if key not in self.statistics:
            self.statistics[key] = measure(self, name)
        return self.statistics[key]

    def over_batch(self, name: str) -> Tensor:
        """``[M]`` a statistic at every trained step of the optimizer step, on all ranks (scope ``batch`` only)."""
        assert self.everywhere is not None
        return self.everywhere(self.key(name))


def measure(steps: Steps, name: str) -> Tensor:
    """One of `STATISTICS` ``[n]`` from an open chunk, without gradient."""
    who, _, what = name.partition("_")
    distribution = steps.student if who == "student" else steps.teacher
    assert distribution is not None
    with torch.no_grad():
        if what == "entropy":
            return distribution.entropy()
        if what == "confidence":
            assert isinstance(distribution, CategoricalChunk)
            return distribution.confidence()
        return distribution.log_prob(steps.action).detach()


def row_sum(steps: Steps, values: Tensor) -> Tensor:
    """``[N]`` → ``[B]``"""
    total = values.new_zeros(len(steps.trajectories))
    return total.index_add(0, steps.trajectory, values)


def to_rows(steps: Steps, values: Tensor) -> Tensor:
    """``[N]`` → ``[B, T]``, zero where nothing is trained."""
    rows = values.new_zeros(steps.trajectories.mask.shape)
    rows.view(-1)[steps.index] = values
    return rows
