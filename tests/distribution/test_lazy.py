"""Normals that exist only while their chunk is open."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from opd_lightning.distribution import Gaussian, Lazy, Stream
from opd_lightning.objective import ForwardKL, Objective, ReverseKL, Term
from tests.distribution.dense import MASK, B, T, compare, seeded
from tests.objective.reference import batch


class Field(nn.Module):
    """One forward pass per state; counts how many graphs are alive."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)
        self.idle = nn.Parameter(torch.zeros(1))
        nn.init.normal_(self.layer.weight, generator=seeded(seed))
        self.states = torch.randn(B * T, 3, generator=seeded(7), dtype=torch.float64)
        self.alive = self.peak = 0

    def forward(self, index: Tensor) -> Gaussian:
        mean = torch.tanh(self.layer(self.states[index]))
        if mean.requires_grad:
            self.alive += len(index)
            self.peak = max(self.peak, self.alive)
            weakref.finalize(mean, self._drop, len(index))
        return Gaussian(mean, torch.tensor(0.5, dtype=torch.float64))

    def _drop(self, states: int) -> None:
        self.alive -= states

    def lazy(self, trained: bool = True) -> Lazy:
        return Lazy(self, list(self.parameters()) if trained else [], size=1)


@pytest.mark.parametrize("chunk_steps", [1, 2, 6])
def test_lazy_normals_give_the_gradient_of_the_whole_and_hold_one_chunk(chunk_steps):
    student, other = Field(1), Field(2)
    trajectories = batch(MASK, 3)
    trajectories.actions = torch.zeros(B, T, 3, dtype=torch.float64)
    objective = Objective([Term(ReverseKL()), Term(ForwardKL(), coefficient=0.3)], chunk_steps=chunk_steps)
    loss, _ = objective(student.lazy(), {"teacher": Stream(other.lazy(trained=False))}, trajectories)
    assert student.peak == chunk_steps
    whole = Gaussian(student(torch.arange(B * T)).mean.view(B, T, 3), torch.tensor(0.5, dtype=torch.float64))
    said = Gaussian(other(torch.arange(B * T)).mean.detach().view(B, T, 3), torch.tensor(0.5, dtype=torch.float64))
    expected, _ = objective(whole, {"teacher": Stream(said)}, trajectories)
    compare(loss, expected, list(student.layer.parameters()))


def test_a_parameter_that_no_lazy_chunk_depends_on_gets_no_gradient():
    student = Field(1)
    trajectories = batch(MASK, 3)
    loss, _ = Objective([Term(ReverseKL())])(
        student.lazy(), {"teacher": Stream(Field(2).lazy(trained=False))}, trajectories
    )
    loss.backward()
    assert student.idle.grad is None
    assert student.layer.weight.grad is not None
