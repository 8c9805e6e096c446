"""SOD's advantage, against its formula in float64 and what it reduces to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd_lightning.methods.stepwise import StepwiseSum
from opd_lightning.objective import GroupRelative, PolicyGradient, RewardPlusLogRatio, Term
from tests.methods.world import SHAPE, World
from tests.objective.reference import close

EPSILON = 1e-6
TURNS = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2], [0, 0, 1, 2], [0, 1, 2, 2], [0, 0, 0, 0], [0] * 4, [0, 1, 1, 3]])
TURNS = torch.cat([TURNS, torch.tensor([[2, 3, 3, 4]])])
"""The seventh row writes nothing in turn 0, the last one goes on from two recorded turns."""


def world_of(turns=TURNS, **settings):
    world = World(5, **settings)
    channels = {**world.trajectories.channels, "turn": turns}
    world.trajectories = replace(world.trajectories, channels=channels)
    return world


def weights(world, cap):
    """w ``[B, T]`` by loops, as the product over turns that the paper prints; 0 where nothing is trained."""
    delta = (world.log_prob(world.teachers["teacher"]).detach().double() - world.trajectories.behavior_log_probs).abs()
    turns, expected = world.trajectories.channels["turn"], torch.zeros(SHAPE, dtype=torch.float64)
    for row in range(SHAPE[0]):
        mask, product, before = world.mask[row], 1.0, None
        for turn in turns[row][mask].unique().tolist():
            here = mask & (turns[row] == turn)
            distance = float(delta[row][here].mean())
            product *= 1.0 if before is None else (before + EPSILON) / (distance + EPSILON)
            expected[row, here] = min(product, 1 + cap)
            before = distance
    return expected


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(("coefficient", "cap"), [(1.0, 0.2), (0.5, 0.5), (2.0, 0.0), (1.0, 1e9)])
def test_turns_count_by_their_distance_to_the_first(coefficient, cap, stale):
    world = world_of(stale=stale)
    ratio = world.log_prob(world.teachers["teacher"]).detach().double() - world.trajectories.behavior_log_probs
    weight = weights(world, cap)
    assert len(weight[world.mask].unique()) > 4
    expected = world.group_relative + coefficient * weight * ratio
    close(world.values(StepwiseSum(coefficient, cap))[world.mask], expected[world.mask], 1e-6)


def test_the_gradient_is_that_of_its_formula():
    world = world_of()
    expected = world.expected(world.group_relative + weights(world, 0.2) * world.delta)
    for ours, formula in zip(world.gradients(Term(PolicyGradient(StepwiseSum()))), expected, strict=True):
        close(ours, formula, 1e-6)


def test_what_was_observed_counts_for_no_turn():
    """Steps that are not trained separate turns, and their distance is nobody's."""
    world, other = world_of(), world_of()
    behavior = other.trajectories.behavior_log_probs
    other.trajectories = replace(
        other.trajectories, behavior_log_probs=torch.where(world.mask, behavior, behavior - 50.0)
    )
    one, two = (w.values(StepwiseSum())[world.mask] for w in (world, other))
    assert torch.equal(one, two)


def test_reductions():
    """One turn is A + δ, no coefficient is GRPO without a teacher."""
    one_turn = world_of(torch.zeros(SHAPE, dtype=torch.long))
    plain = Term(PolicyGradient(RewardPlusLogRatio(against="behavior")))
    for a, b in zip(one_turn.gradients(Term(PolicyGradient(StepwiseSum()))), one_turn.gradients(plain), strict=True):
        assert torch.equal(a, b)
    world, none = world_of(), StepwiseSum(0.0)
    assert torch.equal(world.values(none)[world.mask], world.values(GroupRelative())[world.mask])
    assert none.needs == GroupRelative.needs
    assert not none.reads


def test_a_cap_below_0_is_refused():
    with pytest.raises(ValueError, match=r"advantage\.cap must be >= 0, got -1"):
        StepwiseSum(cap=-1)
