"""Steps: the trained steps of a micro-batch, or of one chunk, as signals, targets and weights read them.

Shape legend: N trained steps of a micro-batch, n of a chunk, B trajectories.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..distribution import CategoricalChunk, Gaussian, ScoredChunk
from ..trajectory import Trajectories

Chunk = CategoricalChunk | Gaussian | ScoredChunk

STATISTICS: dict[str, Callable[[Any, OpenSteps], Tensor]] = {
    "entropy": lambda distribution, steps: distribution.entropy(),
    "log_prob": lambda distribution, steps: distribution.log_prob(steps.action),
    "confidence": lambda distribution, steps: distribution.confidence(),
    "peak": lambda distribution, steps: distribution.known()[1].amax(-1),
}
"""Statistics of a stream that a part may read, ``[n]`` from an open chunk: entropy in nats, log-prob of the action,
1 − H/log V, the largest probability. Others may be added under a name of their own."""


@dataclass
class Steps:
    """Trained steps of a micro-batch, flattened to N, and what is known of them before any chunk is opened.

    Attributes:
        trajectories: the micro-batch; rewards that abstain read as 0.
        index: ``[N]`` into the flattened B × T.
        available: ``[B]`` bool by teacher: the trajectories for which it is defined; others are for all.
        abstained: ``[B]`` bool: whose reward abstains; None without rewards.
        statistics: ``[N]`` by `statistic_key`.
        stream: what "teacher" stands for (`Term.stream`).
    """

    trajectories: Trajectories
    index: Tensor
    available: dict[str, Tensor] = field(default_factory=dict)
    abstained: Tensor | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)
    stream: str | None = None

    @classmethod
    def of(cls, trajectories: Trajectories, available: dict[str, Tensor] | None = None) -> Steps:
        """Collects all trained steps of a micro-batch."""
        index = trajectories.mask.flatten().nonzero().squeeze(-1)
        return cls(trajectories.without_abstentions(), index, available or {}, trajectories.abstained)

    def __len__(self) -> int:
        return len(self.index)

    def at(self, states: slice | Tensor) -> Steps:
        """Restricts them to some of the N steps."""
        return replace(self, index=self.index[states], statistics=self._cut(states))

    def opened(self, states: slice, student: Chunk, streams: dict[str, Chunk], blind: dict[str, Chunk]) -> OpenSteps:
        """Restricts them to the steps of an open chunk, and adds its distributions."""
        return OpenSteps(
            self.trajectories,
            self.index[states],
            self.available,
            self.abstained,
            self._cut(states),
            student=student,
            streams=streams,
            without_view=blind,
        )

    def _cut(self, states: slice | Tensor) -> dict[str, Tensor]:
        return {key: values[states] for key, values in self.statistics.items()}

    def for_stream(self, stream: str | None) -> Steps:
        """Names the stream that "teacher" stands for, as one term reads these steps."""
        return replace(self, stream=stream)

    @cached_property
    def trajectory(self) -> Tensor:
        """Trajectory of each step, ``[N]`` into B."""
        return self.index // self.trajectories.mask.shape[1]

    @cached_property
    def column(self) -> Tensor:
        """Column of each step, ``[N]`` into T."""
        return self.index % self.trajectories.mask.shape[1]

    @cached_property
    def position(self) -> Tensor:
        """Number ``[N]`` of trained steps before each step in its trajectory; observations don't count."""
        trained = self.trajectories.mask
        return (trained.cumsum(1) - trained.long()).flatten()[self.index]

    @cached_property
    def action(self) -> Tensor:
        """Sampled actions ``[N, ...]``."""
        return self.trajectories.actions.flatten(0, 1)[self.index]

    @cached_property
    def behavior_log_prob(self) -> Tensor:
        """Log-probs ``[N]`` of the actions under the policy that acted; NaN where it stored none."""
        return self.trajectories.behavior_log_probs.flatten()[self.index]

    def channel(self, name: str) -> Tensor:
        """Returns a setting's values ``[N, ...]`` at each step, such as the ``digits`` that a token writes."""
        return self.trajectories.channels[name].flatten(0, 1)[self.index]

    def uniform(self, purpose: str) -> Tensor:
        """Draws ``[N]`` numbers from [0, 1) by trajectory, column and ``purpose``, which keeps draws of parts apart.

        They are the same in every micro-batch, epoch and run on any number of ranks (`Trajectories.seed`).
        """
        # crc32, since Python's `hash` of a text is another one in each process
        seed = self.per_trajectory(self.trajectories.seed) + zlib.crc32(purpose.encode())
        # 24 bits are what float32 holds exactly, so that no draw is rounded up to 1
        return (mixed(mixed(seed) + self.column) >> 40 & (2**24 - 1)).float() / 2**24

    def per_trajectory(self, values: Tensor) -> Tensor:
        """Repeats each trajectory's value ``[B]`` at its steps, ``[N]``."""
        return values[self.trajectory]

    def knows(self, teacher: str) -> Tensor:
        """Returns where a teacher is defined (its view shows something), ``[N]`` bool."""
        if teacher not in self.available:
            return torch.ones(len(self), dtype=torch.bool, device=self.index.device)
        return self.per_trajectory(self.available[teacher])

    def statistic(self, name: str) -> Tensor:
        """Returns the statistic ``<stream>/<what>`` ``[N]``, without gradient.

        The stream is ``student``, ``teacher`` (the term's own) or an entry of ``model.teachers``, and ``what`` one of
        `STATISTICS`.
        """
        return self.statistics[statistic_key(name, self.stream)]


@dataclass
class OpenSteps(Steps):
    """Steps of an open chunk, n of them, with the distributions there.

    Attributes:
        student: with gradient while the chunk is trained.
        streams: teachers by name.
        without_view: teachers by name, without their view, for the log.
        target: what the term compares the student with: its teacher's distribution, after the target.
        inputs: ``[n]`` each, what the term's signal asked for (`Signal.inputs`), such as its advantage.
    """

    student: Chunk = None  # type: ignore[assignment]
    streams: dict[str, Chunk] = field(default_factory=dict)
    without_view: dict[str, Chunk] = field(default_factory=dict)
    target: Chunk | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def for_term(self, stream: str | None, target: Chunk | None) -> OpenSteps:
        """Sets the stream that "teacher" stands for and its distribution, as one term reads these steps."""
        return replace(self, stream=stream, target=target)

    @property
    def teacher(self) -> Any:
        """Distribution that the term compares the student with (its teacher's, after the target)."""
        if self.target is None:
            raise RuntimeError("this term has no teacher; a signal that reads one must declare it in `needs`")
        return self.target

    def statistic(self, name: str) -> Tensor:
        key = statistic_key(name, self.stream)
        # measured once per chunk, for all parts that read it (views of a term share the dict)
        if key not in self.statistics:
            self.statistics[key] = self._measured(name)
        return self.statistics[key]

    @torch.no_grad()
    def _measured(self, name: str) -> Tensor:
        stream, what = name.split("/")
        if stream in ("student", "teacher"):
            distribution = self.student if stream == "student" else self.teacher
        else:
            distribution = self.streams[stream]
        return STATISTICS[what](distribution, self).detach()


def statistic_key(name: str, stream: str | None) -> str:
    """Names the statistic ``<stream>/<what>`` by its stream, where "teacher" stands for ``stream``."""
    of, what = name.split("/")
    return f"{stream}/{what}" if of == "teacher" else name


def mixed(numbers: Tensor) -> Tensor:
    """Scrambles 64-bit integers one to one (the finalizer of splitmix64)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        # the mask makes a logical shift of it: signed integers shift their sign in
        numbers = (numbers ^ (numbers >> shift & (1 << 64 - shift) - 1)) * factor
    return numbers


def to_rows(steps: Steps, values: Tensor) -> Tensor:
    """Spreads values ``[N]`` over ``[B, T]``, zero where nothing is trained."""
    rows = values.new_zeros(steps.trajectories.mask.shape)
    rows.view(-1)[steps.index] = values
    return rows
