"""Signals of single papers, against their formulas in float64."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.methods.signal import Unlikelihood
from opd_lightning.objective import CrossEntropy, Term
from tests.methods.world import World
from tests.objective.reference import close


def loss_of(world, signal):
    loss = world.loss(Term(signal, None))
    return loss.detach(), world.student.gradients(loss)


def mean(world, values):
    return values[world.mask].mean()


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_unlikelihood(margin):
    world = World(1)
    p = world.log_prob(world.student).exp()
    wanted = mean(world, torch.where(p > margin, -(1 - p).log(), 0.0))
    value, gradients = loss_of(world, Unlikelihood(margin))
    close(value, wanted, 1e-6)
    for ours, formula in zip(gradients, world.student.gradients(wanted), strict=True):
        close(ours, formula, 1e-6)
    assert {bool(x) for x in (p > 0.2)[world.mask]} == {True, False}


def test_unlikelihood_lowers_what_it_unlearns_and_is_bounded():
    world = World(2)
    world.trajectories.actions = world.log_probs(world.student).argmax(-1)
    with torch.no_grad():
        world.student.layer.bias.mul_(100)
    value, gradients = loss_of(world, Unlikelihood())
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    with pytest.raises(ValueError, match=r"signal\.margin must be in \[0, 1\), got 1"):
        Unlikelihood(margin=1)


def test_nothing_above_the_margin_has_no_loss():
    world = World(3)
    world.trajectories.actions = world.log_probs(world.student).argmin(-1)
    assert float(loss_of(world, Unlikelihood(0.9))[0]) == 0


@pytest.mark.parametrize("focus", [0.5, 2.0, 3.0])
def test_a_focal_cross_entropy(focus):
    world = World(4)
    log_p = world.log_prob(world.student)
    wanted = mean(world, -((1 - log_p.exp()) ** focus) * log_p)
    value, gradients = loss_of(world, CrossEntropy(focus))
    close(value, wanted, 1e-6)
    for ours, formula in zip(gradients, world.student.gradients(wanted), strict=True):
        close(ours, formula, 1e-6)


def test_without_a_focus_it_is_the_plain_cross_entropy():
    world = World(5)
    value, _ = loss_of(world, CrossEntropy())
    close(value, -mean(world, world.log_prob(world.student)), 1e-6)
    with pytest.raises(ValueError, match=r"signal\.focus must be >= 0, got -1"):
        CrossEntropy(-1)
