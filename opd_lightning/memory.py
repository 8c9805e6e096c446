"""Advice for a run whose memory does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def advising(chunk_mib: float) -> Iterator[None]:
    """Adds advice to errors of memory that are raised within.

    Raises:
        RuntimeError: the memory does not suffice for the objective; the message says what would need less.
    """
    try:
        yield
    except RuntimeError as error:
        # the second is what torch says on a CPU
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise RuntimeError(
            f"out of memory in the objective, whose chunks take {chunk_mib} MiB of logits: lower "
            "model.objective.chunk_mib first, then rollout.micro_batch_size (with more "
            f"trainer.accumulate_grad_batches the result is the same). {error}"
        ) from error
