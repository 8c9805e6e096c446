"""Reader: evaluates student, teachers and objective at trajectories, besides the loss that is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .distribution import Stream
from .objective import Objective, OpenSteps, Queried, Steps, availability
from .optimizer_step import MicroBatch, OptimizerStep
from .policy import View, evaluating
from .ranks import Ranks
from .streams import Streams
from .trajectory import Trajectories


@dataclass(frozen=True)
class Reader:
    """Reads trajectories before they are trained: for parts that see a generation batch, normalizers, and callbacks.

    Every rank must ask for the same at the same time.

    Attributes:
        streams: student and teachers.
        objective: whose parts read.
        trainer: of the run.
        size: trajectories of a micro-batch.
    """

    streams: Streams
    objective: Objective
    trainer: Any
    size: int

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.trainer)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.trainer.strategy.root_device
        return device

    def query(self, batch: MicroBatch) -> dict[str, Stream]:
        """Evaluates every teacher that a term needs now; what was kept of it is not evaluated again."""
        names, again = self.objective.teachers(), self.objective.needs_totals
        return self.streams.query_all(names, batch.trajectories, batch.cache, self.trainer.global_step, again)

    @torch.no_grad()
    def prepare(self, step: OptimizerStep) -> None:
        """Moves an optimizer step to the device and finds what the losses of its micro-batches are divided by."""
        step.trajectories = [trajectories.to(self.device) for trajectories in step.trajectories]
        # a generator: no model runs unless some Z is a sum of weights that read distributions
        queried = ((self.streams.student(batch.trajectories), self.query(batch)) for batch in step)
        sums = self.objective.weight_sums(queried, step.trajectories)
        teachers = self.objective.routed_teachers()
        batches = [(batch, self.streams.available(teachers, batch)) for batch in step.trajectories]
        step.normalizers = self.objective.normalizers(batches, sums, self.ranks.total)

    @torch.no_grad()
    def settle(self, trajectories: Trajectories) -> Trajectories:
        """Evaluates the parts of the objective that see a whole generation batch, before it is trained."""
        self.streams.ahead(self.objective.teachers(), trajectories)
        if not self.objective.generation_parts():
            return trajectories
        teachers, width = self.objective.generation_streams(), trajectories.mask.shape[1]
        pieces = trajectories.split(self.size) if teachers is not None else ()
        # outside of Lightning's hooks, which enter it by themselves
        with self.trainer.precision_plugin.forward_context():
            statistics = self.objective.measure((self._read(piece, teachers or set()) for piece in pieces), width)

        # collectives want the device of the run, parts the CPU, where a generation batch waits
        def everywhere(values: Tensor) -> Tensor:
            return self.ranks.gather(values.to(self.device)).cpu()

        available = self.streams.available(self.objective.teachers(), trajectories)
        return self.objective.settle(trajectories, available, statistics, everywhere)

    def _read(self, trajectories: Trajectories, teachers: set[str], view: View | None = None) -> Queried:
        """Evaluates the student and some teachers at a micro-batch, without gradient; ``view``: in place of theirs."""
        trajectories = trajectories.to(self.device)
        with torch.no_grad(), evaluating(self.streams.policies["student"].model):
            student = self.streams.student(trajectories)
        return student, {name: self.streams.query(name, trajectories, view) for name in sorted(teachers)}, trajectories

    @torch.no_grad()
    def per_step(
        self,
        trajectories: Trajectories,
        read: Callable[[OpenSteps], Tensor],
        teacher: str | None = None,
        view: View | None = None,
    ) -> Tensor:
        """Evaluates ``read`` at every trained step, ``[B, T]`` on the CPU, in micro-batches and chunks.

        Args:
            trajectories: a generation batch.
            read: from the n steps of an open chunk to ``[n]``; any signal will do.
            teacher: an entry of ``model.teachers``, whom ``steps.teacher`` then stands for.
            view: what the teacher is shown; default: its own view.

        Returns:
            NaN where nothing is trained, and where the teacher has nothing to say.
        """
        values, done = torch.full(trajectories.mask.shape, torch.nan, dtype=torch.float32), 0
        for piece in trajectories.split(self.size):
            with self.trainer.precision_plugin.forward_context():
                student, streams, batch = self._read(piece, set() if teacher is None else {teacher}, view)
                steps = Steps.of(batch, availability(streams))
                of_piece = self.objective.per_step(student, streams, steps, read, teacher)
            values[done : done + len(piece), : of_piece.shape[1]] = of_piece.cpu()
            done += len(piece)
        return values
