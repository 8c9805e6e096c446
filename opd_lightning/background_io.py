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
    """Copies checkpoints that `may_follow` to the memory of the host and writes them in a thread, one after the other;
    any other one is there when it has been saved.

    What the thread raised is raised by the next call to save, or by `wait`. Until then nothing is removed: what could
    not be written leaves the one before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._jobs: deque[Future[None]] = deque()
        self._saving: deque[Future[None]] = deque()
        self._following, self._failed = set[str](), False

    @property
    def is_writing(self) -> bool:
        """Tells whether something is not there yet."""
        return not all(job.done() for job in self._jobs)

    def may_follow(self, path: str) -> None:
        """Lets training go on while the next checkpoint at a path is written."""
        self._following.add(path)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if str(path) not in self._following:
            self.wait()
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        self._following.remove(str(path))
        # 1. no more copies than said
        self._saving = deque(job for job in self._saving if not job.done())
        while len(self._saving) >= COPIES:
            with HEART.waiting_for("checkpoint"):
                self._saving.popleft().exception()
        if self._failed:
            self.wait()
        # 2. weights and moments are others with the next step; what holds them is built anew, too
        copies: dict[tuple[Any, ...], Tensor] = {}

        def copy(tensor: Tensor) -> Tensor:
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if not tensor.numel():
                return tensor.detach().to("cpu", copy=True)
            if place not in copies:  # tied weights are written once
                copies[place] = tensor.detach().to("cpu", copy=True)
            return copies[place]

        copied = apply_to_collection(checkpoint, Tensor, copy)
        self._saving.append(self._thread.submit(self._save, copied, path, storage_options))
        self._jobs.append(self._saving[-1])

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint once those before are written, which are in its place."""
        self._jobs.append(self._thread.submit(self._remove, path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        self.wait()
        return super().load_checkpoint(path, map_location, weights_only)

    def wait(self) -> None:
        """Returns when all that was to be written is there.

        Raises:
            OSError: something could not be written.
        """
        errors = [error for job in self._jobs if (error := job.exception()) is not None]
        self._jobs.clear()
        self._failed = False
        if errors:
            raise errors[0]

    def teardown(self) -> None:
        self.wait()

    def _save(self, checkpoint: dict[str, Any], path: Any, storage_options: Any) -> None:
        try:
            super().save_checkpoint(checkpoint, path, storage_options)
        except BaseException:
            self._failed = True
            raise

    def _remove(self, path: Any) -> None:
        if not self._failed:
            super().remove_checkpoint(path)
