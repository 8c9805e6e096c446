"""Checkpoints that are written while training goes on."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from .heart import HEART
from .slices import CheckpointIO

COPIES = 2
"""Checkpoints that are held in memory: Lightning writes the best one and the last one, one after the other."""


class BackgroundIO(CheckpointIO):
    """Copies a checkpoint to the memory of the host and writes it in a thread, one after the other.

    What the thread raised is raised by the next call to save, or by `wait`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._jobs: deque[Future[None]] = deque()
        self._saving: deque[Future[None]] = deque()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        # 1. no more copies than said
        self._saving = deque(job for job in self._saving if not job.done())
        while len(self._saving) >= COPIES:
            self._finish(self._saving.popleft())
        self._raise()
        # 2. weights and moments are others with the next step; what holds them is built anew, too
        copied = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
        self._jobs.append(self._thread.submit(super().save_checkpoint, copied, path, storage_options))
        self._saving.append(self._jobs[-1])

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint once those before are written, which are in its place."""
        self._jobs.append(self._thread.submit(super().remove_checkpoint, path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        self.wait()
        return super().load_checkpoint(path, map_location, weights_only)

    def wait(self) -> None:
        """Returns when all that was to be written is there.

        Raises:
            OSError: something could not be written.
        """
        while self._jobs:
            self._finish(self._jobs.popleft())

    def teardown(self) -> None:
        self.wait()

    def _raise(self) -> None:
        """Raises what went wrong meanwhile."""
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()

    @staticmethod
    def _finish(job: Future[None]) -> None:
        with HEART.waiting_for("checkpoint"):
            job.result()
