"""Optimizer steps: their micro-batches, and places."""

from typing import Any

import torch
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.utilities import move_data_to_device

from opd_lightning.optimizer_step import OptimizerStep
from tests.test_trajectory import make


def test_micro_batches_know_their_place():
    step = OptimizerStep([make([3, 1]), make([2]), make([1])])
    assert [(batch.index, batch.is_first, batch.is_last, len(batch)) for batch in step] == [
        (0, True, False, 2),
        (1, False, False, 1),
        (2, False, True, 1),
    ]
    first, second, _ = step
    first.cache["teacher"] = "kept"  # type: ignore[assignment]
    assert next(iter(step)).cache == {"teacher": "kept"}
    assert second.cache == {}


def test_lightning_hands_it_on_as_it_is():
    """Neither moved twice nor rounded: log-probs of sampling stay those of sampling under half precision."""
    batch: Any = next(iter(OptimizerStep([make([3, 1])])))
    assert move_data_to_device(batch, torch.device("meta")) is batch
    assert HalfPrecision("bf16-true").convert_input(batch) is batch
    assert batch.trajectories.behavior_log_probs.dtype == torch.float32
