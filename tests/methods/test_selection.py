"""What is trained at all, against the papers' rules by loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opd_lightning.methods.selection import Gap, KeepLikeliest, KeepTop, Teachability
from opd_lightning.objective import GroupRelative, ImportanceRatio, LogRatio, Objective, PolicyGradient, ReverseKL, Term
from tests.methods.world import SHAPE, V, World
from tests.objective.reference import close


def kl(world, one, other):
    """``[B, T]`` between two policies."""
    log_a, log_b = world.log_probs(one).detach(), world.log_probs(other).detach()
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def between(values, among, low, high):
    start, stop = among.quantile(low), among.quantile(high)
    return ((values - start) / (stop - start)).clamp(0, 1)


def soft_or(world):
    entropy, apart = world.entropy(world.student), kl(world, world.student, world.teachers["teacher"])
    h = between(entropy, entropy[world.mask], 0.0, 0.98)
    d = between(apart, apart[world.mask], 0.0, 1.0)
    return h + d - h * d


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75])
def test_the_highest_of_each_trajectory_are_kept(share):
    world = World(1)
    scores, expected = soft_or(world), torch.zeros(SHAPE)
    for row, mask in enumerate(world.mask):
        steps = mask.nonzero().flatten().tolist()
        last = sorted((float(scores[row, t]) for t in steps), reverse=True)[max(1, math.floor(share * len(steps))) - 1]
        for t in steps:
            expected[row, t] = float(scores[row, t]) >= last - 1e-9  # two that are both at the top are kept together
    weight = KeepTop(share=share)
    assert torch.equal(world.values(weight)[world.mask], expected[world.mask].double())
    divergence = (log_p := world.log_probs(world.student)).exp() * (
        log_p - world.log_probs(world.teachers["teacher"]).detach()
    )
    mean = (divergence.sum(-1) * expected)[world.mask].sum() / expected[world.mask].sum()
    kept = Term(ReverseKL(), weights=[KeepTop(share=share)], normalizer="weights")
    for ours, formula in zip(world.gradients(kept), world.student.gradients(mean), strict=True):
        close(ours, formula, 1e-6)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_highest_of_the_batch_are_kept(share):
    world = World(2)
    kept = world.values(KeepTop(share=share, per="batch"))[world.mask]
    scores = soft_or(world)[world.mask]
    count = math.ceil(share * len(scores))
    assert int(kept.sum()) == count
    assert float(scores[kept == 1].min()) >= float(scores[kept == 0].max()) - 1e-6


@pytest.mark.parametrize("per", ["trajectory", "batch"])
def test_all_of_them_are_the_loss_without_the_weight(per):
    world = World(3)
    for ours, plain in zip(
        world.gradients(Term(ReverseKL(), weights=[KeepTop(share=1.0, per=per)])),
        world.gradients(Term(ReverseKL())),
        strict=True,
    ):
        assert torch.equal(ours, plain)


def test_states_that_are_all_alike_are_kept_together():
    world = World(4)
    with torch.no_grad():
        world.student.hidden.zero_()
    world.teachers["teacher"] = world.student.copy()
    assert (world.values(KeepTop(share=0.5))[world.mask] == 1).all(), "and nothing is divided by zero"
    assert V > 1


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"share must be in .* and per trajectory or batch, got 0 and 'trajectory'"):
        KeepTop(share=0)


@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
def test_the_trajectories_that_the_teacher_finds_likeliest_are_kept(share):
    world = World(5)
    log_q = world.log_prob(world.teachers["teacher"]).detach()
    means = torch.stack([row[mask].mean() for row, mask in zip(log_q, world.mask, strict=True)])
    expected = (means >= means.quantile(1 - share)).double()[:, None].expand(SHAPE)
    assert torch.equal(world.values(KeepLikeliest(share))[world.mask], expected[world.mask])
    assert float(expected[:, 0].mean()) == {0.5: 0.5, 0.8: 0.75, 1.0: 1.0}[share]


def test_of_trajectories_a_share_above_0_is_kept():
    with pytest.raises(ValueError, match=r"weight\.share must be in \(0, 1\], got 0"):
        KeepLikeliest(0)


def test_what_is_teachable_is_kept():
    """By sets of ids, state by state."""
    world, k = World(6), 2
    log_p, log_q = (world.log_probs(policy).detach() for policy in (world.student, world.teachers["teacher"]))
    apart, within = torch.zeros(2, *SHAPE).double()
    for place in world.mask.nonzero():
        p, q = log_p[tuple(place)], log_q[tuple(place)]
        ours, theirs = ({*row.argsort(descending=True)[:k].tolist()} for row in (p, q))
        ids = sorted(ours | theirs)
        p_, q_ = p[ids].log_softmax(0), q[ids].log_softmax(0)
        apart[tuple(place)] = (q_.exp() * (q_ - p_)).sum()
        within[tuple(place)] = q[sorted(ours)].exp().sum()
    scores = between(apart, apart[world.mask], 0.05, 0.95) * between(within, within[world.mask], 0.05, 0.95)
    kept = world.values(KeepTop(Teachability(k), share=0.25, per="batch"))[world.mask]
    values = scores[world.mask]
    assert int(kept.sum()) == math.ceil(0.25 * len(values))
    assert float(values[kept == 1].min()) >= float(values[kept == 0].max()) - 1e-6


def test_nothing_is_teachable_where_the_teacher_says_the_same():
    world = World(7)
    world.teachers["teacher"] = world.student.copy()
    kept = world.values(KeepTop(Teachability(2), share=0.1, per="batch"))
    assert (kept[world.mask] == 1).all(), "all scores are 0, and equal ones stay together"
    with pytest.raises(ValueError, match=r"score\.k must be >= 1, got 0"):
        Teachability(0)


def genevolve(share=0.1, coefficient=2.0):
    """The loss of GenEvolve, without its anchor."""
    weights = [ImportanceRatio(cap=2.0), KeepTop(Gap(), share=share, per="batch")]
    learned = PolicyGradient(LogRatio(clip=10.0), clip=None, ratio="none")
    grpo = Term(PolicyGradient(GroupRelative()), None, normalizer="trajectories")
    return [grpo, Term(learned, weights=weights, coefficient=coefficient, normalizer="on")]


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_genevolve_adds_the_reverse_kl_of_the_steps_where_the_experience_matters_most(share):
    world = World(23, stale=True)
    ratio = (world.log_prob(world.student).detach() - world.trajectories.behavior_log_probs).exp()
    gap = world.delta.abs()[world.mask]
    kept = world.delta.abs() >= gap.sort(descending=True).values[math.ceil(share * len(gap)) - 1]
    assert int(kept[world.mask].sum()) == math.ceil(share * len(gap))
    learned = -(ratio.clamp(max=2) * kept * world.delta * world.log_prob(world.student))[world.mask].mean()
    (grpo, both), wanted = genevolve(share), world.student.gradients(2 * learned)
    with_grpo, alone = world.gradients(grpo, both), world.gradients(grpo)
    for ours, plain, formula in zip(with_grpo, alone, wanted, strict=True):
        close(ours - plain, formula, 1e-5)


def test_genevolve_without_an_experience_is_grpo():
    world = World(24)
    queried, nobody = world.queried, torch.zeros(SHAPE[0], dtype=torch.bool)
    plain = world.gradients(genevolve()[0])
    world.queried = lambda rows: (  # type: ignore[method-assign]
        (found := queried(rows))[0],
        {"teacher": replace(found[1]["teacher"], available=nobody[rows])},
    )
    for ours, grpo in zip(world.gradients(*genevolve()), plain, strict=True):
        assert torch.equal(ours, grpo)
    assert Objective(genevolve(coefficient=0.0)).teachers() == set()
