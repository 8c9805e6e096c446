"""Advantages and weights over turns, against their formulas in float64 by loops, and against what they reduce to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opd_lightning.methods.turns import CoupledReward, ShiftCredit
from opd_lightning.objective import CrossEntropy, GroupRelative, PolicyGradient, Term, TurnMean, TurnRelative
from tests.methods.world import GROUP, SHAPE, World
from tests.objective.reference import close

TURNS = 2


def rewards(world):
    """``[B, T]``, the reward of each step's turn."""
    turn, reward = (world.trajectories.channels[name] for name in ("turn", "reward"))
    return (turn[:, :, None] == turn[:, None, :]).double() @ reward.double()[..., None]


def by_turns(world, values):
    """Σ over turns of the mean over a turn's steps, the mean of the trajectories."""
    turn, total = world.trajectories.channels["turn"], torch.zeros((), dtype=torch.float64)
    for row in range(SHAPE[0]):
        for number in range(TURNS):
            here = world.mask[row] & (turn[row] == number)
            if here.any():
                total = total + values[row][here].mean()
    return total / SHAPE[0]


def test_the_coupled_reward_by_turns():
    """CoARS' objective, with a loop over trajectories and turns."""
    world = World(1)
    advantage = rewards(world)[..., 0] + 0.3 * world.delta.clamp(-0.5, 0.5)
    part = CoupledReward(coefficient=0.3, clip=0.5)
    close(world.values(part)[world.mask], advantage[world.mask], 1e-6)
    term = Term(PolicyGradient(part, clip=None, ratio="none"), weights=[TurnMean()], normalizer="trajectories")
    loss = -by_turns(world, advantage * world.log_prob(world.student))
    for ours, formula in zip(world.gradients(term), world.student.gradients(loss), strict=True):
        close(ours, formula, 1e-6)
    assert ((advantage - rewards(world)[..., 0]).abs() <= 0.15 + 1e-9).all()


def test_a_coupled_reward_without_a_teacher_is_reinforce_by_turns():
    part, world = CoupledReward(coefficient=0.0), World(2)
    assert "teacher" not in part.needs
    assert not part.reads
    close(world.values(part)[world.mask], rewards(world)[..., 0][world.mask], 1e-6)
    with pytest.raises(ValueError, match=r"coefficient must be >= 0 and clip > 0, got 0\.1 and 0"):
        CoupledReward(clip=0)


def test_shift_credit():
    world = World(3)
    shift, best = rewards(world)[..., 0], torch.zeros(SHAPE[0], dtype=torch.float64)
    for row in range(SHAPE[0]):
        best[row] = shift[row].abs().max()
    size = shift.abs() / best.clamp(min=1e-12)[:, None]
    sign = (world.group_relative * shift).sign()
    advantage = world.group_relative * sign * size * torch.exp(0.7 * sign)
    advantage = torch.where(shift == 0, world.group_relative, advantage)
    close(world.values(ShiftCredit(tau=0.7))[world.mask], advantage[world.mask], 1e-6)
    close(world.values(ShiftCredit(tau=0.0)).abs()[world.mask],
          torch.where(shift == 0, 1.0, size)[world.mask] * world.group_relative.abs()[world.mask], 1e-6)  # fmt: skip
    here = world.mask & (shift == 0)
    assert here.any()
    assert torch.equal(world.values(ShiftCredit())[here], world.values(GroupRelative())[here])
    with pytest.raises(ValueError, match=r"advantage\.tau must be >= 0, got -1"):
        ShiftCredit(-1)


def test_each_turn_of_a_group_has_a_mean_of_its_own():
    world = World(4)
    turn, reward = (world.trajectories.channels[name] for name in ("turn", "reward"))
    batch, expected = world.trajectories, torch.zeros(SHAPE, dtype=torch.float64)
    has = torch.tensor([[bool((batch.mask[i] & (turn[i] == k)).any()) for k in range(TURNS)] for i in range(SHAPE[0])])
    of_turn = torch.tensor([[float(reward[i][turn[i] == k].sum()) for k in range(TURNS)] for i in range(SHAPE[0])])
    to_go = of_turn[:, 0] + 0.5 * of_turn[:, 1] * has[:, 1], of_turn[:, 1]
    for group in GROUP.unique():
        for number in range(TURNS):
            members = (group == GROUP) & has[:, number]
            values = to_go[number][members].double()
            scaled = (values - values.mean()) / (values.var(correction=0).sqrt() + 1e-6)
            for member, value in zip(members.nonzero()[:, 0], scaled, strict=True):
                expected[member][turn[member] == number] = value
    generation = settled(world, TurnRelative(discount=0.5))
    # a turn that only the others have is nobody's own before it
    close(generation[world.mask], expected[world.mask], 1e-5)


def settled(world, part):
    from opd_lightning.objective import Objective

    objective = Objective([Term(PolicyGradient(part), teacher=None)])
    batch = objective.settle(world.trajectories, {}, {}, lambda values: values)
    (channel,) = set(batch.channels) - set(world.trajectories.channels)
    return batch.channels[channel].double()


def test_of_one_turn_it_is_group_relative():
    world = World(5)
    channels = world.trajectories.channels
    last = torch.zeros(SHAPE)
    last[:, 0] = world.trajectories.reward
    world.trajectories = replace(
        world.trajectories, channels=channels | {"turn": torch.zeros(SHAPE, dtype=torch.long), "reward": last}
    )
    close(settled(world, TurnRelative())[world.mask], world.group_relative[world.mask], 1e-5)
    with pytest.raises(ValueError, match=r"advantage\.discount must be in \[0, 1\], got 2"):
        TurnRelative(2)


def test_each_turn_weighs_the_same():
    world = World(6)
    term = Term(CrossEntropy(), teacher=None, weights=[TurnMean()], normalizer="trajectories")
    loss = by_turns(world, -world.log_prob(world.student))
    for ours, formula in zip(world.gradients(term), world.student.gradients(loss), strict=True):
        close(ours, formula, 1e-6)


def test_unknown_rewards_count_nothing():
    world = World(7)
    world.trajectories.channels["reward"] = torch.full(SHAPE, math.nan)
    assert not world.values(CoupledReward(coefficient=0.0))[world.mask].any()
