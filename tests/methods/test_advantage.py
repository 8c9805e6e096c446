"""Advantages of single papers, against their formulas in float64 and against what they reduce to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opd_lightning.methods.advantage import (
    Belief,
    Calibrated,
    DirectionAdaptive,
    FDivergence,
    Judged,
    RewardMinusPMI,
    Unit,
    Whitened,
)
from opd_lightning.objective import (
    JSD,
    CrossEntropy,
    ForwardKL,
    GroupRelative,
    LogRatio,
    PolicyGradient,
    ReverseKL,
    RewardTimesLogRatio,
    Term,
)
from tests.methods.world import GROUP, REWARD, SHAPE, V, World
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


def test_direction_adaptive():
    """By loops over trajectories: with the quantile .2 most steps are repelled, and the sign flips exactly at it."""
    world = World(3)
    entropy, weights, gaps = world.entropy(world.student), *torch.zeros(2, *SHAPE).double()
    for row, mask in enumerate(world.mask):
        here, delta = entropy[row][mask], world.delta[row][mask]
        gap = delta / (delta.abs().quantile(0.5) + 1e-6)
        spread = (here - here.mean()).abs().mean()
        weights[row][mask] = torch.tanh((here.quantile(0.2) - here) / (spread + 1e-6)) * torch.sigmoid(gap.abs() - 1)
        gaps[row][mask] = gap
    part = DirectionAdaptive(coefficient=0.3, quantile=0.2)
    advantage = world.group_relative + 0.3 * weights * gaps
    close(world.values(part)[world.mask], advantage[world.mask], 1e-5)
    for ours, formula in zip(gradients(world, part), world.expected(advantage), strict=True):
        close(ours, formula, 1e-5)
    assert (weights[world.mask].abs() < 1).all()
    assert (weights[world.mask] < 0).double().mean() > 0.5
    assert world.values(part)[6:][world.mask[6:]].abs().max() > 0, "also where a group's rewards are all equal"


def test_direction_adaptive_without_a_coefficient_is_grpo_and_asks_no_teacher():
    assert_equal(World(2), DirectionAdaptive(0.0), GroupRelative())
    assert "teacher" not in DirectionAdaptive(0.0).needs
    with pytest.raises(ValueError, match=r"advantage\.quantile must be in \[0, 1\], got 2"):
        DirectionAdaptive(quantile=2)


@pytest.mark.parametrize(
    ("name", "signal"), [("reverse_kl", ReverseKL()), ("forward_kl", ForwardKL()), ("jsd", JSD(0.5))]
)
def test_an_f_divergence_is_its_exact_policy_gradient(name, signal):
    """Over all actions of every state, −E_p[advantage · ∇log p] is the gradient of the divergence."""
    world = World(4)
    log_p, log_q = world.log_probs(world.student), world.log_probs(world.teachers["teacher"]).detach()
    advantages = []
    for action in range(V):
        world.trajectories.actions = torch.full(SHAPE, action)
        advantages.append(world.values(FDivergence(name)))
    values = torch.stack(advantages, -1)[world.mask]
    u = (log_q - log_p.detach()).exp()[world.mask]
    formula = {"reverse_kl": u.log() - 1, "forward_kl": u, "jsd": ((1 + u) / 2).log() / 2}[name]
    close(values, formula, 1e-6)
    surrogate = -(log_p.detach().exp()[world.mask] * formula * log_p[world.mask]).sum(-1).mean()
    exact = world.gradients(Term(signal))
    for ours, wanted in zip(world.student.gradients(surrogate), exact, strict=True):
        close(ours, wanted, 1e-6)


def test_an_unknown_f_divergence_is_refused():
    with pytest.raises(ValueError, match="divergence is reverse_kl, forward_kl or jsd, not 'kl'"):
        FDivergence("kl")


def test_whitened():
    world = World(5)
    bounded = world.delta.clamp(-0.5, 0.5)
    among = bounded[world.mask]
    advantage = (bounded - among.mean()) / among.var(unbiased=False).sqrt()
    part = Whitened(LogRatio(), clip=0.5)
    close(world.values(part)[world.mask], advantage[world.mask], 1e-5)
    for ours, formula in zip(gradients(world, part), world.expected(advantage), strict=True):
        close(ours, formula, 1e-5)
    one, other = world.values(Whitened(LogRatio(), clip=None)), world.values(Whitened(Scaled(), clip=None))
    close(one[world.mask], other[world.mask], 1e-5)


class Scaled(LogRatio):
    """3δ + 2: another unit, which whitening takes out."""

    def __call__(self, steps):
        return 3 * super().__call__(steps) + 2


def test_whitening_has_a_floor_and_knows_what_it_can_settle():
    world = World(5)
    world.teachers["teacher"] = world.student.copy()
    close(world.values(Whitened(LogRatio(), floor=0.1))[world.mask], torch.zeros(int(world.mask.sum())), 1e-5)
    twice = Whitened(Whitened(LogRatio()))
    close(World(5).values(twice)[world.mask], World(5).values(Whitened(LogRatio()))[world.mask], 1e-4)
    with pytest.raises(ValueError, match="a baseline reads whole distributions"):
        Whitened(LogRatio(baseline=ReverseKL()))
    with pytest.raises(ValueError, match="clip and floor must be > 0, got 0 and 1"):
        Whitened(LogRatio(), clip=0, floor=1)


def test_belief():
    world = World(6)
    right = {0: 2, 1: 1, 2: 2}
    raw, credit = torch.zeros(SHAPE).double(), torch.zeros(SHAPE).double()
    for row in range(SHAPE[0]):
        group = int(GROUP[row])
        size = int((group == GROUP).sum())
        odds = math.log((right[group] + 2.0) / (size - right[group] + 2.0))
        start = odds
        for t in range(SHAPE[1]):
            if world.mask[row, t]:
                after = odds + float(world.delta[row, t].clamp(-1, 1))
                raw[row, t] = 1 / (1 + math.exp(-after)) - 1 / (1 + math.exp(-odds))
                odds = after
        ends = 1 / (1 + math.exp(-odds)) - 1 / (1 + math.exp(-start))
        assert math.isclose(float(raw[row].sum()), ends, abs_tol=1e-9), "the gains add up"
    assert (raw.abs() <= world.delta.abs() / 4 + 1e-9)[world.mask].all()
    for group in (0, 1):
        here = world.mask & (group == GROUP)[:, None]
        signed = world.group_relative[here].sign() * raw[here].abs()
        credit[here] = (signed - signed.mean()) / signed.var(unbiased=False).sqrt()
    close(world.values(Belief(clip=1.0, prior=2.0))[world.mask], credit[world.mask], 1e-5)
    assert (world.values(Belief())[6:][world.mask[6:]] == 0).all(), "a group that is all right has no sign"


def test_belief_where_the_answer_tells_nothing():
    world = World(6)
    world.teachers["teacher"] = world.student.copy()
    close(world.values(Belief())[world.mask], torch.zeros(int(world.mask.sum())), 1e-2)
    with pytest.raises(ValueError, match=r"clip and prior must be > 0, got 3\.0 and 0"):
        Belief(prior=0)


@pytest.mark.parametrize("shift", ["both", "right", "wrong"])
@pytest.mark.parametrize("statistic", ["mean", "extreme"])
def test_calibrated(statistic, shift):
    """After the shift the gap of every mixed group is the margin, or what it was if that was more."""
    world, moved, is_right = World(7), set(), REWARD > 0.5
    for margin in (-5.0, 0.4, 3.0):
        values = world.values(Calibrated(margin, statistic, shift))
        change = [(values - world.delta.clamp(-10, 10))[row][world.mask[row]] for row in range(SHAPE[0])]
        assert all(torch.allclose(row, row[0].expand_as(row), atol=1e-5) for row in change), "one for each trajectory"
        means = torch.stack([values[row][mask].mean() for row, mask in enumerate(world.mask)])
        before = torch.stack([world.delta.clamp(-10, 10)[row][mask].mean() for row, mask in enumerate(world.mask)])
        for group in (0, 1):
            right, wrong = (group == GROUP) & is_right, (group == GROUP) & ~is_right
            ends = (torch.mean, torch.mean) if statistic == "mean" else (torch.min, torch.max)
            gap, old = (float(ends[0](m[right]) - ends[1](m[wrong])) for m in (means, before))
            assert math.isclose(gap, max(margin, old), abs_tol=1e-5)
            moved.add(old < margin)
        assert all(float(row.abs().max()) < 1e-5 for row in change[6:]), "a group of one kind stays as it is"
        unmoved = is_right if shift == "wrong" else ~is_right
        if shift != "both":
            assert all(float(change[row].abs().max()) < 1e-5 for row in unmoved.nonzero().flatten().tolist())
    assert moved == {True, False}


def test_calibrated_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="statistic is mean or extreme, shift both, right or wrong, clip > 0"):
        Calibrated(statistic="median")


def test_unit_makes_every_step_likelier():
    world = World(8)
    for ours, wanted in zip(gradients(world, Unit()), world.gradients(Term(CrossEntropy(), None)), strict=True):
        close(ours, wanted, 1e-6)


def test_rlsd_and_rlrt_are_each_others_inverse():
    """Swapping the sign of the exponent turns one into the other; only right rollouts are scaled in RLRT."""
    world = World(9)
    factor = (-world.group_relative.sign() * world.delta).exp().clamp(0.8, 1.2)
    advantage = world.group_relative * (0.5 + 0.5 * factor)
    reverse = RewardTimesLogRatio(reverse=True)
    close(world.values(reverse)[world.mask], advantage[world.mask], 1e-6)
    right = (REWARD == 1)[:, None].expand(SHAPE)
    only = torch.where(right, advantage, world.group_relative)
    close(world.values(RewardTimesLogRatio(reverse=True, only_right=True))[world.mask], only[world.mask], 1e-6)
    assert_equal(world, RewardTimesLogRatio(0.0, reverse=True, only_right=True), GroupRelative())


def judged_advantage(world, share, clip, k, full):
    """VISD by sets of ids, one step after the other."""
    teacher = world.teachers["judged"]
    log_p, log_q = (world.log_probs(policy).detach() for policy in (world.student, teacher))
    advantage = world.group_relative.clone()
    for i, t in world.mask.nonzero().tolist():
        action = int(world.trajectories.actions[i, t])
        ids = sorted({*log_q[i, t].argsort(descending=True)[:k].tolist(), action})
        p, q = log_p[i, t].exp(), log_q[i, t].exp()
        gain = math.log(q[action] / q[ids].sum()) - math.log(p[action] / p[ids].sum())
        gain = (1 - full) * gain + full * (math.log(q[action]) - math.log(p[action]))
        a = float(advantage[i, t])
        factor = min(max(math.exp((a > 0) * gain - (a < 0) * gain), 1 - clip), 1 + clip)
        advantage[i, t] = a * ((1 - share) + share * factor)
    return advantage


@pytest.mark.parametrize(("share", "clip", "k", "full"), [(0.5, 0.2, 2, 0.0), (0.8, 0.9, 1, 0.3), (1.0, 0.5, V, 1.0)])
def test_a_judged_advantage(share, clip, k, full):
    world = World(21, ("teacher", "judged"))
    ours, wanted = Judged("judged", share, clip, k, full), judged_advantage(world, share, clip, k, full)
    close(world.values(ours)[world.mask], wanted[world.mask], 1e-5)
    term = Term(PolicyGradient(ours), None)
    for mine, formula in zip(world.gradients(term), world.expected(wanted), strict=True):
        close(mine, formula, 1e-5)
    plain = world.group_relative
    assert ((wanted - plain).abs() <= share * clip * plain.abs() + 1e-9).all(), "the sign never flips"


def test_without_a_share_a_judge_or_a_difference_it_is_grpo():
    world = World(22, ("teacher", "judged"))
    grpo = Term(PolicyGradient(GroupRelative()), None)
    off = Term(PolicyGradient(Judged(share=0.0)), None)
    assert off.teachers == set(), "no teacher is asked"
    same = World(22, ("teacher", "judged"))
    same.teachers["judged"] = same.student.copy()
    unseen = World(22, ("teacher", "judged"))
    queried = unseen.queried
    nobody = torch.zeros(SHAPE[0], dtype=torch.bool)
    unseen.queried = lambda rows: (  # type: ignore[method-assign]
        (found := queried(rows))[0],
        found[1] | {"judged": replace(found[1]["judged"], available=nobody[rows])},
    )
    on = Term(PolicyGradient(Judged()), None)
    assert on.teachers == {"judged"}
    for changed, term in ((world, off), (same, on), (unseen, on)):
        for ours, plain in zip(changed.gradients(term), world.gradients(grpo), strict=True):
            close(ours, plain, 1e-6)
    for arguments, message in (({"clip": 0}, "clip in"), ({"teacher": "teacher"}, "stands for a term's own")):
        with pytest.raises(ValueError, match=message):
            Judged(**arguments)
