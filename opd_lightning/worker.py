"""Rollouts ahead of training: a thread that acts with its own copy of the student."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import lightning as L
import torch

from .actor import Actor
from .policy import Policy, frozen_copy
from .rollout_settings import Rollout
from .sharding import refuse_sharded
from .student_view import as_it_was, settings_of
from .trajectory import Trajectories


def refuse_teachers(rollout: Rollout) -> None:
    """Refuses teachers that act ahead of training.

    Raises:
        ValueError: a teacher is to act ahead of training.
    """
    if teachers := sorted(rollout.policies - {"student", "dataset"}):
        raise ValueError(
            f"rollout.max_staleness={rollout.max_staleness}: the worker that rolls out ahead has a copy of the student "
            f"only; rollout.behavior or rollout.blend names {', '.join(teachers)}"
        )


class RolloutWorker:
    """One thread, on a stream of its own where there is a GPU. Jobs run in the order in which they were given.

    Args:
        actor: whose student is copied; it may be trained while the worker acts.
        trainer: of the run.

    Raises:
        ValueError: the worker can't hold a copy of what acts: rollout.behavior names a teacher, the student is
            quantized, or the strategy shards it.
    """

    def __init__(self, actor: Actor, trainer: L.Trainer) -> None:
        key = f"rollout.max_staleness={actor.rollout.max_staleness}"
        student = actor.policies["student"]
        refuse_teachers(actor.rollout)
        if getattr(student.model, "is_quantized", False):
            raise ValueError(f"{key}: a quantized student can't be copied for the worker; set it to 0")
        refuse_sharded(trainer, key, "which then has no copy to act with; set it to 0")
        self._actor, self._student = actor, student.model
        self._copy = Policy(frozen_copy(student.model), copy.deepcopy(student.processor), path=student.path)
        self._threads = ThreadPoolExecutor(1, "rollout")
        device = trainer.strategy.root_device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the student's weights over; nothing may be running."""
        for copied, weight in zip(self._copy.model.parameters(), self._student.parameters(), strict=True):
            # the others are what they were when they were copied
            if weight.requires_grad:
                copied.copy_(weight)
        if self._stream is not None:
            # the worker's stream must not act before the copies are done
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def submit(self, job: Callable[[Actor], Trajectories]) -> Future[Trajectories]:
        """Runs ``job(actor)`` in the thread; what it raises reaches whoever asks for the result, with its traceback."""
        given = self._actor
        actor = replace(
            given,
            policies={**given.policies, "student": self._copy},
            # knobs may be turned before the job begins
            rollout=copy.deepcopy(given.rollout),
            student_view=as_it_was(given.student_view, settings_of(given.student_view)),
        )

        def run() -> Trajectories:
            stream: AbstractContextManager[Any] = (
                nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
            )
            with stream:
                return job(actor)

        return self._threads.submit(run)

    def close(self) -> None:
        """Waits for the job that is running and forgets the others."""
        self._threads.shutdown(wait=True, cancel_futures=True)
