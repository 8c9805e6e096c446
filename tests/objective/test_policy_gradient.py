"""Policy gradient: the surrogate's gradient is what the formula says, and advantages carry none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd_lightning.objective import (
    Advantage,
    CrossEntropy,
    GroupRelative,
    LogLinear,
    LogRatio,
    Objective,
    PolicyGradient,
    ReverseKL,
    RewardPlusLogRatio,
    RewardTimesLogRatio,
    Steps,
    Support,
    Term,
)
from opd_lightning.objective.advantage import returns_to_go
from opd_lightning.objective.policy_gradient import surrogate
from opd_lightning.trajectory import Trajectories
from tests.objective.reference import Policy, batch, close, dense, examples, kl

V = 5
MASK = [[1, 1, 1, 0], [1, 0, 1, 1]]
SHAPE = (2, 4)


class World:
    """A student, a teacher, and rollouts of the student with rewards."""

    def __init__(self, seed: int = 0, on_policy: bool = True, same: bool = False, **changes: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.student = Policy.random(generator, SHAPE, V)
        self.teacher = self.student.copy() if same else Policy.random(generator, SHAPE, V)
        reward, group = torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.5])
        self.trajectories = batch(
            MASK, V, seed, reward=reward, group_mean=group, group_std=torch.tensor([0.4, 0.5]), **changes
        )
        if on_policy:
            self.trajectories.behavior_log_probs = self.every_log_prob(self.student).detach()

    def every_log_prob(self, policy: Policy) -> Tensor:
        """``[B, T]`` of the actions."""
        logits = policy.logits(torch.ones(SHAPE, dtype=torch.bool)).log_softmax(-1)
        return logits.gather(-1, self.trajectories.actions.flatten()[:, None]).view(SHAPE)

    def log_prob(self, policy: Policy) -> Tensor:
        """``[N]``"""
        return self.every_log_prob(policy)[self.trajectories.mask]

    @property
    def delta(self) -> Tensor:
        return (self.log_prob(self.teacher) - self.log_prob(self.student)).detach()

    @property
    def group_relative(self) -> Tensor:
        """``[N]`` worked out by hand: (1 − .25)/.4 and (0 − .5)/.5."""
        per_row = torch.tensor([0.75 / (0.4 + 1e-6), -0.5 / (0.5 + 1e-6)], dtype=torch.float64)
        return per_row[:, None].expand(SHAPE)[self.trajectories.mask]

    def loss(self, advantage: Advantage, chunk_steps: int | None = 2, **settings: Any) -> Tensor:
        term = Term(PolicyGradient(advantage, **settings))
        return Objective([term], chunk_steps=chunk_steps)(
            self.student.distribution, {"teacher": self.teacher.stream}, self.trajectories
        )[0]

    def gradient(self, *args: Any, **settings: Any) -> list[Tensor]:
        return self.student.gradients(self.loss(*args, **settings))


def by_loops(values: Tensor, mask: Tensor, discount: float, normalize: bool) -> Tensor:
    """Each return as a sum over the trained steps that follow, one by one."""
    found = torch.zeros_like(values)
    for row in range(values.shape[0]):
        for t in range(values.shape[1]):
            rest = [u for u in range(t, values.shape[1]) if mask[row, u]]
            total = sum(discount**i * float(values[row, u]) for i, u in enumerate(rest))
            found[row, t] = total / len(rest) if normalize and rest else total
    return found


def advantages(world: World) -> list[tuple[Advantage, Tensor]]:
    """Every advantage, and what it is at each step by its formula."""
    delta, reward = world.delta, world.group_relative
    mask = world.trajectories.mask
    rows = torch.zeros(SHAPE, dtype=torch.float64).masked_scatter(mask, delta)
    factor = (reward.sign() * delta).exp().clamp(0.7, 1.3)
    # of two rows of three steps the first is right
    against = (-reward.sign() * delta).exp().clamp(0.7, 1.3)
    rebellious = torch.cat([(reward * (0.4 + 0.6 * against))[:3], reward[3:]])
    logits = world.student.logits(mask), world.teacher.logits(mask), world.trajectories.actions[mask]
    divergence = dense(kl, *logits).detach()
    on_two = dense(kl, *logits, of="student", k=2, remainder="renormalize").detach()
    return [
        (LogRatio(), delta),
        (LogRatio(clip=0.3), delta.clamp(-0.3, 0.3)),
        (LogRatio(discount=0.9), by_loops(rows, mask, 0.9, False)[mask]),
        (LogRatio(discount=1.0, length_normalized=True), by_loops(rows, mask, 1.0, True)[mask]),
        (GroupRelative(), reward),
        (GroupRelative(scale=False), torch.tensor([0.75, -0.5]).double()[:, None].expand(SHAPE)[mask]),
        (RewardPlusLogRatio(0.5), reward + 0.5 * delta),
        (RewardTimesLogRatio(share=0.6, clip=0.3), reward * (0.4 + 0.6 * factor)),
        (RewardTimesLogRatio(0.6, 0.3, reverse=True, only_right=True), rebellious),
        (LogRatio(baseline=ReverseKL()), delta + divergence),
        (LogRatio(baseline=ReverseKL(Support("student", 2, "renormalize"))), delta + on_two),
    ]


@pytest.mark.parametrize("which", range(11))
@examples(10)
@given(seed=st.integers(0, 10**6))
def test_on_the_first_pass_the_gradient_is_minus_advantage_times_that_of_the_log_prob(which, seed):
    world = World(seed)
    advantage, expected = advantages(world)[which]
    wanted = world.student.gradients((-expected * world.log_prob(world.student)).sum() / 6)
    for actual, formula in zip(world.gradient(advantage), wanted, strict=True):
        close(actual, formula, 1e-6)


@pytest.mark.parametrize("which", range(11))
def test_off_policy_the_surrogate_is_clipped(which):
    """Both signs of the advantage and both sides of the clip occur among the seeds."""
    sides = set()
    for seed in range(6):
        world = World(seed, on_policy=False)
        advantage, expected = advantages(world)[which]
        log_prob, old = world.log_prob(world.student), world.trajectories.behavior_log_probs[world.trajectories.mask]
        total = torch.zeros((), dtype=torch.float64)
        for now, then, a in zip(log_prob, old, expected, strict=True):
            ratio = (now - then).exp()
            bound = 1.1 if a > 0 else 0.8
            active = bool(ratio > bound) if a > 0 else bool(ratio < bound)
            sides.add((bool(a > 0), active))
            total = total - (bound * a if active else ratio * a)
        loss = world.loss(advantage, clip=0.2, clip_high=0.1)
        close(loss, total / 6, 1e-6)
        for actual, wanted in zip(world.student.gradients(loss), world.student.gradients(total / 6), strict=True):
            close(actual, wanted, 1e-6)
    assert len(sides) == 4


def test_an_upper_clip_defaults_to_the_lower_one():
    ratio = torch.tensor([0.5, 0.9, 1.1, 1.5], dtype=torch.float64)
    for sign, expected in ((1.0, [-0.5, -0.9, -1.1, -1.2]), (-1.0, [0.8, 0.9, 1.1, 1.5])):
        value = surrogate(ratio, torch.full((4,), sign).double(), 0.2, 0.2)
        close(value, torch.tensor(expected), 1e-7)
    assert PolicyGradient(LogRatio(), clip=0.3).clip_high == 0.3


def test_without_a_clip_the_surrogate_is_the_importance_weighted_one():
    world = World(6, on_policy=False)
    mask = world.trajectories.mask
    ratio = (world.log_prob(world.student) - world.trajectories.behavior_log_probs[mask]).exp()
    loss = world.loss(LogRatio(), clip=None)
    close(loss, -(ratio * world.delta).sum() / 6, 1e-6)
    wanted = world.student.gradients(-(ratio * world.delta).sum() / 6)
    for actual, formula in zip(world.gradient(LogRatio(), clip=None), wanted, strict=True):
        close(actual, formula, 1e-6)


@pytest.mark.parametrize("clips", [(None, None), (0.3, 0.4)])
def test_the_ratio_of_a_trajectory_is_the_geometric_mean_of_its_steps(clips):
    """GSPO: value and gradient of −mean over trajectories of min(sA, clip(s)A), where A is that of the trajectory."""
    sides = set()
    for seed in range(8):
        world = World(seed, on_policy=False)
        old = world.trajectories.behavior_log_probs.masked_fill(~world.trajectories.mask, 0)
        now = world.every_log_prob(world.student).masked_fill(~world.trajectories.mask, 0)
        s = ((now - old).sum(1) / 3).exp()
        advantage = torch.tensor([0.75 / (0.4 + 1e-6), -0.5 / (0.5 + 1e-6)], dtype=torch.float64)
        low, high = clips
        clipped = s if low is None else s.clamp(1 - low, 1 + high)
        total = -torch.minimum(s * advantage, clipped * advantage).mean()
        sides |= set((s != clipped).tolist())
        term = Term(
            PolicyGradient(GroupRelative(), clip=low, clip_high=high, ratio="trajectory"), normalizer="trajectories"
        )
        loss = Objective([term], chunk_steps=2)(world.student.distribution, {}, world.trajectories)[0]
        close(loss, total, 1e-6)
        for actual, wanted in zip(world.student.gradients(loss), world.student.gradients(total), strict=True):
            close(actual, wanted, 1e-6)
    assert sides == ({False} if clips[0] is None else {False, True})


def test_without_a_ratio_nobody_has_to_know_how_likely_the_behavior_was():
    world = World(7)
    world.trajectories.behavior_log_probs = torch.full(SHAPE, torch.nan)
    signal = PolicyGradient(LogRatio(), clip=None, ratio="none")
    assert "behavior" not in signal.needs
    assert "behavior" in PolicyGradient(LogRatio(against="behavior"), clip=None, ratio="none").needs
    wanted = world.student.gradients(-(world.delta * world.log_prob(world.student)).sum() / 6)
    for actual, formula in zip(world.gradient(LogRatio(), clip=None, ratio="none"), wanted, strict=True):
        close(actual, formula, 1e-6)


def test_a_baseline_is_unbiased_and_takes_variance_away():
    """Over all actions of a state: the mean advantage is 0, and the gradient's the same as without (vOPD)."""
    world = World(8)
    p = world.student.logits(world.trajectories.mask).softmax(-1).detach()
    log_ratio = world.teacher.logits(world.trajectories.mask).log_softmax(-1).detach() - p.log()
    advantage = log_ratio + (p * -log_ratio).sum(-1, keepdim=True)
    close((p * advantage).sum(-1), torch.zeros(6), 1e-12)
    mean = [(p[..., None] * a[..., None] * (torch.eye(V) - p[:, None])).sum(1) for a in (advantage, log_ratio)]
    close(mean[0], mean[1], 1e-12)


def test_an_advantage_has_no_gradient():
    world = World()
    student = world.student.distribution
    steps = Steps.of(world.trajectories)
    opened = student.at(steps.index).accumulator().open(slice(0, 6))
    teacher = world.teacher.teacher.at(steps.index).chunk(slice(0, 6))
    assert opened.logits.requires_grad
    for advantage, expected in advantages(world):
        if advantage.scope != "row":
            seen = steps.opened(slice(0, 6), opened, {"teacher": teacher}, {}).for_term("teacher", teacher)
            value = advantage(seen)
            assert value.grad_fn is None
            close(value, expected, 1e-6)


def test_an_advantage_that_forgets_to_detach_is_detached_for_it():
    class Leaky(LogRatio):
        def __call__(self, steps: Any) -> Tensor:
            return steps.teacher.log_prob(steps.action) - steps.student.log_prob(steps.action)

    world = World(1)
    for leaky, clean in zip(world.gradient(Leaky()), world.gradient(LogRatio()), strict=True):
        torch.testing.assert_close(leaky, clean)


@examples(15)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.3, 0.5, 1.0]), clip=st.sampled_from([0.2, 0.9, 1.0]))
def test_rlsd_never_flips_the_sign_of_the_reward(seed, share, clip):
    world = World(seed)
    world.teacher.layer.bias.data.mul_(50)  # large log-ratios, some impossible steps
    advantage = RewardTimesLogRatio(share, clip)
    everything = Steps.of(world.trajectories)
    student = world.student.distribution.at(everything.index).chunk(slice(0, 6))
    teacher = world.teacher.teacher.at(everything.index).chunk(slice(0, 6))
    steps = everything.opened(slice(0, 6), student, {"teacher": teacher}, {}).for_term("teacher", teacher)
    value, reward = advantage(steps), world.group_relative
    assert (value * reward >= 0).all()
    assert (value.abs() >= reward.abs() * (1 - share * clip) - 1e-6).all()
    assert (value.abs() <= reward.abs() * (1 + share * clip) + 1e-6).all()


def test_rlsd_with_share_zero_is_grpo_bit_by_bit():
    world = World(3)
    for ours, grpo in zip(world.gradient(RewardTimesLogRatio(0.0)), world.gradient(GroupRelative()), strict=True):
        assert torch.equal(ours, grpo)


def test_a_teacher_equal_to_the_student_teaches_nothing():
    world = World(same=True)
    for advantage in (LogRatio(), LogRatio(discount=0.95)):
        assert world.loss(advantage).item() == 0
        assert all((gradient == 0).all() for gradient in world.gradient(advantage))
    for ours, grpo in zip(world.gradient(RewardPlusLogRatio(2.0)), world.gradient(GroupRelative()), strict=True):
        assert torch.equal(ours, grpo)


def test_where_all_rewards_of_a_group_are_equal_only_the_teacher_teaches():
    world = World(2)
    trajectories = world.trajectories
    trajectories.group_mean, trajectories.group_std = trajectories.reward.clone(), torch.zeros(2)
    assert all((gradient == 0).all() for gradient in world.gradient(GroupRelative()))
    for both, ratio in zip(world.gradient(RewardPlusLogRatio()), world.gradient(LogRatio()), strict=True):
        torch.testing.assert_close(both, ratio)


@examples(25)
@given(
    seed=st.integers(0, 10**6),
    discount=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    normalize=st.booleans(),
    steps=st.integers(1, 6),
)
def test_returns_to_go_equal_a_loop(seed, discount, normalize, steps):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, steps, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, steps, generator=generator) < 0.7
    mask[0, 0] = True
    values = values * mask
    found = returns_to_go(values, mask, discount, normalize)
    close(found[mask], by_loops(values, mask, discount, normalize)[mask], 1e-12)


def test_terms_with_one_teacher_and_different_targets_read_their_own_log_probs():
    world = World(4)
    other = Policy.random(torch.Generator().manual_seed(9), SHAPE, V).stream
    streams = {"teacher": world.teacher.stream, "reference": other}

    def gradient(*terms: Term) -> list[Tensor]:
        return world.student.gradients(
            Objective(list(terms))(world.student.distribution, streams, world.trajectories)[0]
        )

    for advantage in (LogRatio, lambda: LogRatio(discount=0.9)):
        plain = Term(PolicyGradient(advantage()))
        moved = Term(PolicyGradient(advantage()), target=LogLinear({"teacher": 0.2, "reference": 0.8}))
        both = gradient(plain, moved)
        for sum_of, one, two in zip(both, gradient(plain), gradient(moved), strict=True):
            close(sum_of, one + two, 1e-7)


def test_beside_supervised_completions_without_behavior_log_probs():
    """Their log-probs are NaN, which must reach neither the gradient nor the log."""
    world = World(5, sources=("student", "dataset"), source=torch.tensor([0, 1]))
    world.trajectories.behavior_log_probs[1] = float("nan")
    terms = [Term(PolicyGradient(LogRatio()), source="student"), Term(CrossEntropy(), None, source="dataset")]
    loss, averages = Objective(terms)(world.student.distribution, {"teacher": world.teacher.stream}, world.trajectories)
    log_prob = world.log_prob(world.student)
    expected = (-(world.delta * log_prob)[:3].sum() - log_prob[3:].sum()) / 6
    for actual, wanted in zip(world.student.gradients(loss), world.student.gradients(expected), strict=True):
        close(actual, wanted, 1e-7)
    close(torch.tensor(averages.compute()["loss/PolicyGradient"]), -world.delta[:3].mean(), 1e-6)


def test_group_statistics_are_those_of_the_trajectories():
    world = World()
    steps = Steps.of(Trajectories.select(world.trajectories, torch.tensor([1])))
    close(GroupRelative()(steps), torch.full((3,), -1.0), 1e-5)


# -- construction -------------------------------------------------------------------------------------------------


def test_a_divergence_is_not_an_advantage():
    with pytest.raises(
        TypeError,
        match=r"signal\.advantage must be an Advantage such as LogRatio, got ReverseKL\. What depends on the prefix "
        r"alone, as a divergence does, has zero expected gradient as an advantage; use it as a signal of its own\.",
    ):
        PolicyGradient(ReverseKL())


def test_out_of_range_settings_are_refused():
    with pytest.raises(ValueError, match=r"advantage\.discount must be in \[0, 1\], got 1\.1"):
        LogRatio(discount=1.1)
    with pytest.raises(ValueError, match="length_normalized: there is no return to normalize while discount is 0"):
        LogRatio(length_normalized=True)
    with pytest.raises(ValueError, match=r"advantage\.clip must be > 0, got -1"):
        LogRatio(clip=-1)
    with pytest.raises(ValueError, match=r"advantage\.share must be in \[0, 1\], got 2"):
        RewardTimesLogRatio(share=2)
    for clip in (0, 1.5):
        with pytest.raises(ValueError, match=rf"advantage\.clip must be in \(0, 1\], or the sign .* got {clip}"):
            RewardTimesLogRatio(clip=clip)
    with pytest.raises(ValueError, match=r"signal\.clip and clip_high must be > 0, got -0\.2 and -0\.2"):
        PolicyGradient(LogRatio(), clip=-0.2)
    with pytest.raises(ValueError, match="a step's own log-ratio against the student as it is now"):
        LogRatio(discount=0.9, baseline=ReverseKL())
    with pytest.raises(ValueError, match=r"signal\.ratio is step, trajectory or none, not 'row'"):
        PolicyGradient(LogRatio(), ratio="row")
    with pytest.raises(ValueError, match=r"signal\.ratio: none leaves nothing to clip; set signal\.clip to null"):
        PolicyGradient(LogRatio(), ratio="none")
    with pytest.raises(ValueError, match=r"signal\.clip and clip_high must be > 0, got 0\.2 and 0"):
        PolicyGradient(LogRatio(), clip_high=0)
