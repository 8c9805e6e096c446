"""What cutting weights over ranks refuses; what it does is in test_ranks.py, with two processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from opd_lightning.sharding import mesh_of, shard


@pytest.mark.parametrize("strategy", [ModelParallelStrategy, FSDPStrategy])
def test_other_ways_to_shard_are_refused_with_the_one_that_works(strategy):
    with pytest.raises(ValueError, match=f"{strategy.__name__} is not supported.*fsdp2"):
        mesh_of(SimpleNamespace(strategy=strategy()))  # type: ignore[arg-type]


def test_a_quantized_student_is_not_cut():
    student = nn.Linear(2, 2)
    student.is_quantized = True  # type: ignore[assignment]
    with pytest.raises(ValueError, match="can't cut quantized weights; use ddp"):
        shard(student, mesh=None)
