"""Advantages of single papers, against their formulas in float64 and against what they reduce to."""

from __future__ import annotations

import math

import pytest
import torch

from opd_lightning.methods.advantage import RewardMinusPMI
from opd_lightning.objective import GroupRelative, PolicyGradient, Term
from tests.methods.world import World
from tests.objective.reference import close


def gradients(world, advantage):
    return world.gradients(Term(PolicyGradient(advantage)))


def assert_equal(world, one, other):
    for a, b in zip(gradients(world, one), gradients(world, other), strict=True):
        assert torch.equal(a, b)


def test_anti_self_distillation():
    world = World(1)
    shape = 0.5 * (world.delta.exp().log1p() - math.log(2))
    advantage = world.group_relative - 0.7 * shape
    close(world.values(RewardMinusPMI(0.7))[world.mask], advantage[world.mask], 1e-6)
    for ours, formula in zip(gradients(world, RewardMinusPMI(0.7)), world.expected(advantage), strict=True):
        close(ours, formula, 1e-6)
    shape = (world.values(GroupRelative()) - world.values(RewardMinusPMI(1.0)))[world.mask]
    assert (shape >= -0.5 * math.log(2) - 1e-6).all()
    assert (shape.sign() == world.delta[world.mask].sign()).all()


def test_anti_self_distillation_without_a_share_is_grpo_and_asks_no_teacher():
    assert_equal(World(2), RewardMinusPMI(0.0), GroupRelative())
    assert "teacher" not in RewardMinusPMI(0.0).needs
    with pytest.raises(ValueError, match=r"advantage\.share must be >= 0, got -1"):
        RewardMinusPMI(-1)
