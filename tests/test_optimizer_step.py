"""Optimizer steps: their micro-batches, and totals over micro-batches and ranks."""

import dataclasses
from typing import Any

import torch
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.utilities import move_data_to_device

from opd_lightning.optimizer_step import OptimizerStep, Totals
from tests.test_trajectory import make


def test_a_statistic_over_the_batch_is_gathered_over_ranks():
    totals = Totals(3.0, 3.0, statistics=[{"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([3.0])}])
    totals.gather = lambda values: torch.cat([values, values + 10])
    assert totals.over_batch("x").tolist() == [1, 2, 3, 11, 12, 13]


def test_trained_steps_are_counted_over_micro_batches_and_ranks():
    step = OptimizerStep.of([make([3, 1]), make([2])], lambda count: 2 * count)
    assert step.totals.trained_steps == step.totals.rewarded_steps == 12
    rewarded = dataclasses.replace(make([3, 1]), reward=torch.tensor([1.0, torch.nan]))
    assert OptimizerStep.of([rewarded], float).totals.rewarded_steps == 3


def test_micro_batches_know_their_place():
    step = OptimizerStep.of([make([3, 1]), make([2]), make([1])], float)
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
    batch: Any = next(iter(OptimizerStep.of([make([3, 1])], float)))
    assert move_data_to_device(batch, torch.device("meta")) is batch
    assert HalfPrecision("bf16-true").convert_input(batch) is batch
    assert batch.trajectories.behavior_log_probs.dtype == torch.float32
