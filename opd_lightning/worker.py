"""Rollouts ahead of training: a thread that acts with its own copy of the student."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins import MixedPrecision

from .sharding import refuse_sharded
from .student_view import as_it_was, settings_of
from .teacher import Policy, frozen_copy
from .trajectory import Trajectories

if TYPE_CHECKING:
    from .module import OnPolicyDistillation
    from .rollout import Rollout


def refuse_teachers(rollout: Rollout) -> None:
    """
    Raises:
        ValueError: a teacher is to act ahead of training.
    """
    if teachers := sorted(rollout.sources - {"student", "dataset"}):
        raise ValueError(
            f"rollout.max_staleness={rollout.max_staleness}: the worker that rolls out ahead has a copy of the student "
            f"only; rollout.behavior names {', '.join(teachers)}"
        )


class RolloutWorker:
    """One thread, on a stream of its own where there is a GPU. Jobs run in the order in which they were given.

    Args:
        module: whose student is copied; it may be trained while the worker acts.

    Raises:
        ValueError: the worker can't hold a copy of what acts: rollout.behavior names a teacher, the student is
            quantized, or the strategy shards it.
    """

    def __init__(self, module: OnPolicyDistillation) -> None:
        key = f"rollout.max_staleness={module.rollout.max_staleness}"
        student = module.policies["student"]
        refuse_teachers(module.rollout)
        if getattr(student.model, "is_quantized", False):
            raise ValueError(f"{key}: a quantized student can't be copied for the worker; set it to 0")
        refuse_sharded(module.trainer, key, "which then has no copy to act with; set it to 0")
        self._module, self._student = module, student.model
        # shares everything with the module but what a rollout changes: model, processor, caches
        self._actor = copy.copy(module)
        self._actor.policies = {
            **module.policies,
            "student": Policy(frozen_copy(student.model), copy.deepcopy(student.processor), path=student.path),
        }
        self._actor.stopwatch = copy.deepcopy(module.stopwatch)
        self._threads = ThreadPoolExecutor(1, "rollout")
        # autocast belongs to a thread; what "true" half precision sets belongs to all, and weights have it anyway
        plugin = module.trainer.precision_plugin
        self._precision = plugin.forward_context if isinstance(plugin, MixedPrecision) else nullcontext
        self._stream = torch.cuda.Stream(module.device) if module.device.type == "cuda" else None

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes the student's weights over; nothing may be running."""
        mine = self._actor.policies["student"].model
        for copied, weight in zip(mine.parameters(), self._student.parameters(), strict=True):
            if weight.requires_grad:
                copied.copy_(weight)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def submit(self, job: Callable[[Any], Trajectories]) -> Future[Trajectories]:
        """Runs ``job(actor)`` in the thread; what it raises reaches whoever asks for the result, with its traceback."""
        # knobs may be turned before the job begins
        rollout, view = copy.deepcopy(self._module.rollout), self._module.student_view
        view = as_it_was(view, settings_of(view))

        def run() -> Trajectories:
            stream: AbstractContextManager[Any] = (
                nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
            )
            self._actor.rollout, self._actor.student_view = rollout, view
            with stream, self._precision():
                return job(self._actor)

        return self._threads.submit(run)

    def close(self) -> None:
        """Waits for the job that is running and forgets the others."""
        self._threads.shutdown(wait=True, cancel_futures=True)
