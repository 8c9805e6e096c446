"""Callbacks of single papers: what they do to a generation batch, row by row."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from opd_lightning.actor import group_statistics
from opd_lightning.methods.advantage import RewardMinusPMI
from opd_lightning.methods.callback import (
    BelowCliff,
    DynamicSampling,
    EntropyGate,
    OverlongPunishment,
    RockTokens,
    cliff,
)
from opd_lightning.objective import Objective, PolicyGradient, Term
from opd_lightning.rollout_settings import Rollout
from tests.callbacks import toy
from tests.methods.world import GROUP, REWARD, V, World
from tests.tiny import LongerIsBetter


class Module(SimpleNamespace):
    """What callbacks read of a setting, and what they had logged."""

    def __init__(self, horizon: int = 4, group_size: int = 3, has_rewards: bool = True) -> None:
        super().__init__(
            rollout=SimpleNamespace(horizon=horizon, group_size=group_size),
            has_rewards=has_rewards,
            logged=defaultdict(list),
        )

    def record(self, name, values, counts=None):
        self.logged[name].append(values)


def test_groups_of_equal_rewards_are_left_out_and_counted():
    world, module = World(), Module()
    kept = DynamicSampling().on_rollouts(module, world.trajectories)
    differ = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]).bool()  # the pair is right
    assert torch.equal(kept.mask, world.mask & differ[:, None])
    assert module.logged["dynamic_sampling/dropped"][0].mean() == 2 / 8
    assert DynamicSampling().on_rollouts(module, World(reward=REWARD * 0 + 0.1).trajectories).mask.sum() == 0


def test_a_reward_that_abstains_does_not_tell_a_group_apart():
    reward = torch.tensor([1.0, torch.nan, 1.0, 0.0, torch.nan, 1.0, torch.nan, torch.nan])
    kept = DynamicSampling().on_rollouts(Module(), World(reward=reward).trajectories)
    assert kept.mask.any(1).tolist() == [False] * 3 + [True] * 3 + [False] * 2


def test_dynamic_sampling_is_refused_where_there_is_nothing_to_compare():
    with pytest.raises(ValueError, match=r"DynamicSampling reads rewards: set model\.reward"):
        DynamicSampling().check(Module(has_rewards=False))
    with pytest.raises(ValueError, match=r"set rollout\.group_size > 1"):
        DynamicSampling().check(Module(group_size=1))
    DynamicSampling().check(Module())


def test_long_rollouts_lose_reward_linearly():
    """Of at most 4 steps the last 2: a rollout of 3 steps loses a half, one of 4 steps all of 1."""
    world, module = World(), Module()
    shaped = OverlongPunishment(cache=0.5).on_rollouts(module, world.trajectories)
    punishment = torch.tensor([{1: 0.0, 2: 0.0, 3: 0.5, 4: 1.0}[int(n)] for n in world.mask.sum(1)])
    assert torch.equal(shaped.reward, REWARD - punishment)
    mean, std = group_statistics(REWARD - punishment, GROUP)
    assert torch.equal(shaped.group_mean, mean)
    assert torch.equal(shaped.group_std, std)
    assert torch.equal(module.logged["overlong_punishment"][0], punishment.double())
    untouched = OverlongPunishment(cache=0.2).on_rollouts(Module(horizon=100), world.trajectories)
    assert torch.equal(untouched.reward, REWARD)


def test_a_punishment_is_refused_without_rewards_or_with_an_impossible_share():
    with pytest.raises(ValueError, match="OverlongPunishment reads rewards"):
        OverlongPunishment().check(Module(has_rewards=False))
    with pytest.raises(ValueError, match=r"OverlongPunishment\.cache must be in \(0, 1\], got 0"):
        OverlongPunishment(cache=0)


def trace(gate, *entropies):
    """Whether the knob is on after each batch."""
    states = []
    for entropy in entropies:
        gate.see(entropy)
        states.append(len(gate.entropies) == gate.warmup and gate.is_open)
    return states


def test_the_gate_closes_low_and_opens_only_at_its_level():
    gate = EntropyGate("objective.terms.0.coefficient", warmup=3, close=0.93)
    assert trace(gate, 1.1, 0.9, 1.0) == [False, False, True], "warm, and the level is 1"
    assert trace(gate, 0.94, 0.92, 0.97, 0.999, 1.0, 0.93) == [True, False, False, False, True, True]


def test_a_run_with_a_gate_resumes(tmp_path):
    """The toy's teacher has one entropy for all states: the gate opens after the warm-up and stays open."""

    def make():
        term = Term(PolicyGradient(RewardMinusPMI(0.5)), name="anti")
        module = toy.make_module(
            objective=Objective([term]), reward=LongerIsBetter(), rollout=Rollout(batch_size=4, horizon=4, group_size=2)
        )
        return module, [EntropyGate("objective.terms.anti.signal.advantage.share", value=0.3, warmup=2)]

    toy.assert_resumes(make, tmp_path, steps=4)
    module, (gate,) = make()
    module.objective.terms[0].signal.advantage.share = 0.5
    toy.fit(module, tmp_path / "again", [gate], 1)
    assert module.objective.terms[0].signal.advantage.share == 0.0, "off while it warms up"
    toy.fit(module, tmp_path / "on", [gate], 4)
    assert module.objective.terms[0].signal.advantage.share == 0.3


def test_a_gate_refuses_impossible_numbers():
    with pytest.raises(ValueError, match=r"EntropyGate: warmup=0 must be >= 1 and close=0\.93 in \(0, 1\]"):
        EntropyGate("rollout.temperature", warmup=0)


@pytest.mark.parametrize(("p", "b", "c"), [(0.9993, 0.81, 5.0), (0.99, 0.5, 5.0), (0.9, 0.3, 2.0)])
def test_the_cliff_is_where_two_tokens_reach_the_cap(p, b, c):
    """Found by bisection: the strength at which the fixed point leaves the other token 1/c of the teacher's."""

    def left(strength):
        other = (1 - b) * ((1 - p) / (1 - b)) ** strength
        return other / (other + b * (p / b) ** strength)

    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) > (1 - p) / c else (low, middle)
    assert cliff(p, b, c) == pytest.approx(low, rel=1e-9)


def test_the_papers_cliff_and_the_base_that_needs_none():
    assert 1.18 <= cliff(0.9993, 0.81, 5.0) <= 1.28
    assert cliff(0.9993, 0.5, 5.0) < cliff(0.9993, 0.9, 5.0) < cliff(0.9993, 0.99, 5.0)
    assert cliff(0.9, 0.9, 5.0) == cliff(0.9, 0.95, 5.0) == math.inf
    assert math.isfinite(cliff(1.0, 0.5, 5.0))


def test_strength_stays_below_the_cliff():
    """Means over the steps at which an id of the form was written, of every second batch."""
    world, module, turned = World(), Module(), []
    guard = BelowCliff("objective.terms.0.signal.advantage.strength", [1, 2], strength=1.3, margin=0.05, every=2)
    guard.turn = lambda path, value: turned.append(value)
    values = {
        name: torch.rand(world.mask.shape, generator=torch.Generator().manual_seed(seed)) * 0.1 + low
        for seed, (name, low) in enumerate({"teacher": 0.89, "base": 0.4}.items())
    }
    for rows in values.values():
        rows[~world.mask] = torch.nan
    module.per_step, module.gather, module.device = lambda t, read, name: values[name], lambda v: v, "cpu"
    guard.advance(module)
    guard.on_rollouts(module, world.trajectories)
    here = torch.isin(world.trajectories.actions, torch.tensor([1, 2])) & world.mask
    p, b = (float(values[name][here].double().mean()) for name in ("teacher", "base"))
    assert turned == [1.3, pytest.approx(min(1.3, cliff(p, b, 5.0) - 0.05))]
    assert module.logged["below_cliff/threshold"] == [pytest.approx(cliff(p, b, 5.0))]
    values["teacher"] = values["teacher"] * 0  # not looked at
    guard.on_rollouts(module, world.trajectories)
    assert turned[2] == turned[1]
    values["teacher"] = values["base"]
    guard.on_rollouts(module, world.trajectories)
    assert turned[3] == 1.3, "no cliff"
    world.trajectories.actions = torch.zeros_like(world.trajectories.actions)
    guard.seen = 0
    guard.on_rollouts(module, world.trajectories)
    assert guard.limit == math.inf, "the form was not written: the last limit holds"


def test_the_strength_never_falls_below_one_and_numbers_are_checked():
    guard = BelowCliff("objective.terms.0.coefficient", [1], margin=5.0)
    guard.see(0.999, 0.5)
    assert guard.limit == 1.0
    with pytest.raises(ValueError, match="ids must not be empty"):
        BelowCliff("objective.terms.0.coefficient", [])


def test_rock_tokens_are_those_with_the_largest_part_of_the_loss(tmp_path):
    """Mean loss × frequency is an id's part of the sum."""
    world, module, rocks = World(), Module(), RockTokens(count=3, every=2)
    losses = torch.rand(world.mask.shape, generator=torch.Generator().manual_seed(0)).masked_fill(
        ~world.mask, torch.nan
    )
    module.per_step, module.gather, module.device = lambda *_: losses, lambda values: values, "cpu"
    for _ in range(3):
        assert rocks.on_rollouts(module, world.trajectories) is world.trajectories
    actions, total = world.trajectories.actions, float(losses.nansum())
    of = {i: losses[(actions == i) & world.mask] for i in range(V)}
    ranked = rocks.ranked()
    assert [entry["id"] for entry in ranked] == sorted(of, key=lambda i: -float(of[i].sum()))[:3]
    for entry in ranked:
        mean, frequency = float(of[entry["id"]].mean()), len(of[entry["id"]]) / int(world.mask.sum())
        assert entry["loss"] * total / int(world.mask.sum()) == pytest.approx(mean * frequency)
        assert entry["frequency"] == pytest.approx(frequency)
    assert sum(rocks.counts.values()) == 2 * int(world.mask.sum()), "it looked at two of three batches"
    rocks.on_fit_end(SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path)), None)
    assert json.loads((tmp_path / "rock_tokens.json").read_text(encoding="utf-8")) == ranked


def test_rock_tokens_need_ids(tmp_path):
    with pytest.raises(ValueError, match="RockTokens counts ids of a vocabulary"):
        toy.fit(toy.make_module(), tmp_path, [RockTokens()], 1)
    with pytest.raises(ValueError, match="count=0 and every=10 must be >= 1"):
        RockTokens(count=0)


@pytest.mark.parametrize("callback", [DynamicSampling(), OverlongPunishment(0.5)], ids=lambda c: type(c).__name__)
def test_nothing_depends_on_the_order_of_rows(callback):
    trajectories = World().trajectories
    order = torch.randperm(len(trajectories), generator=torch.Generator().manual_seed(1))
    expected = callback.on_rollouts(Module(), trajectories).select(order)
    shuffled = callback.on_rollouts(Module(), trajectories.select(order))
    for name in ("mask", "reward", "group_mean", "group_std"):
        torch.testing.assert_close(getattr(shuffled, name), getattr(expected, name))
