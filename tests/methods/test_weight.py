"""Weights of single papers, against their formulas in float64 and against what they reduce to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opd_lightning.methods.weight import (
    Accepted,
    Agreement,
    Brief,
    Doubt,
    EntropySample,
    Evidence,
    Fallback,
    PerplexityShare,
    SuccessShare,
    Sureness,
    TeacherRatio,
    TokenIds,
)
from opd_lightning.objective import (
    Constant,
    Entropy,
    ForwardKL,
    LogRatio,
    MeanOne,
    Outcome,
    PolicyGradient,
    ReverseKL,
    Steps,
    Term,
)
from tests.methods.world import GROUP, REWARD, SHAPE, World
from tests.objective.reference import close


def assert_weighs(world, weight, expected):
    """The values, and the loss and the gradients that they make."""
    close(world.values(weight)[world.mask], expected[world.mask], 1e-6)
    log_p, log_q = (world.log_probs(policy) for policy in (world.student, world.teachers["teacher"]))
    divergence = (log_p.exp() * (log_p - log_q.detach())).sum(-1)
    wanted = world.student.gradients((expected * divergence)[world.mask].sum() / world.mask.sum())
    for ours, formula in zip(world.gradients(Term(ReverseKL(), weights=[weight])), wanted, strict=True):
        close(ours, formula, 1e-5)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.5])
def test_evidence(threshold):
    """Every kept step has a positive advantage at 0: its log-prob must rise."""
    world = World(1, ("teacher", "plain"))
    assert_weighs(world, Evidence(threshold), (world.delta > threshold).double())
    e = (world.log_prob(world.teachers["teacher"]) - world.log_prob(world.teachers["plain"])).detach()
    close(world.values(Evidence(threshold, "plain"))[world.mask], (e > threshold).double()[world.mask], 1e-9)


def test_evidence_below_all_is_the_loss_without_it_and_a_text_that_tells_nothing_keeps_nothing():
    world = World(1)
    k1 = Term(PolicyGradient(LogRatio()))
    kept = Term(PolicyGradient(LogRatio()), weights=[Evidence(-1e9)])
    for ours, plain in zip(world.gradients(kept), world.gradients(k1), strict=True):
        assert torch.equal(ours, plain)
    world.teachers["teacher"] = world.student.copy()
    assert float(world.values(Evidence())[world.mask].sum()) == 0


def test_doubt():
    world = World(2)
    assert_weighs(world, Doubt(), 1 - world.log_prob(world.student).detach().exp())


def test_token_ids_weigh_the_action_and_leave_the_normalizer_alone():
    world = World(3)
    is_one = torch.isin(world.trajectories.actions, torch.tensor([0, 2]))
    assert_weighs(world, TokenIds([0, 2], 0.25), torch.where(is_one, 0.25, 1.0).double())
    same = world.gradients(Term(ReverseKL(), weights=[TokenIds([0, 2], 1.0)]))
    for ours, plain in zip(same, world.gradients(Term(ReverseKL())), strict=True):
        assert torch.equal(ours, plain)
    with pytest.raises(ValueError, match=r"ids must not be empty and value >= 0, got \[\] and 0"):
        TokenIds([])


def test_agreement_and_its_complement():
    world = World(4)
    wanted = world.delta.clamp(min=0)
    gate = wanted / (wanted + world.entropy(world.teachers["teacher"]))
    assert_weighs(world, Agreement(), gate)
    assert_weighs(world, Agreement(complement=True), 1 - gate)


def test_what_is_accepted_is_split_between_two_terms():
    world = World(5)
    accepted, others = world.values(Accepted()), world.values(Accepted(complement=True))
    assert torch.equal((accepted + others)[world.mask], torch.ones(int(world.mask.sum())).double())
    sure = world.mask & (world.delta >= 0)
    assert (accepted[sure] == 1).all()
    assert 0 < float(accepted[world.mask].mean()) < 1


def test_the_chance_of_being_accepted_is_the_ratio():
    """Over many draws: the mean over p of min(q/p, 1) is 1 − TV(p, q)."""
    world, count = World(5), 400
    total = torch.zeros(int(world.mask.sum())).double()
    who = {"student/log_prob": world.student, "teacher/log_prob": world.teachers["teacher"]}
    statistics = {name: world.log_prob(policy).detach()[world.mask] for name, policy in who.items()}
    for seed in range(count):
        world.trajectories.seed = torch.arange(SHAPE[0]) + 1000 * seed
        steps = replace(Steps.of(world.trajectories).for_stream("teacher"), statistics=statistics)
        total += Accepted()(steps)
    chance = world.delta.clamp(max=0).exp()
    assert float((total / count - chance[world.mask]).abs().max()) < 5 * 0.5 / count**0.5
    world.teachers["teacher"] = world.student.copy()
    assert (world.values(Accepted())[world.mask] == 1).all(), "always, where the teacher is the student"


def test_the_rarer_outcome_counts_more():
    share = float(REWARD.mean())
    expected = torch.where(REWARD == 1, (1 - share) ** 2, share**0.5).double()[:, None].expand(SHAPE)
    assert_weighs(World(6), SuccessShare(2.0, 0.5), expected)
    for outcome in (0.0, 1.0):
        world = World(6, reward=torch.full((8,), outcome))
        assert_weighs(world, SuccessShare(), torch.full(SHAPE, 1 / 8).double())
        assert_weighs(world, MeanOne(SuccessShare()), torch.ones(SHAPE).double())


def test_sureness():
    world = World(7)
    theirs, ours = world.entropy(world.teachers["teacher"]), world.entropy(world.student)
    sure, puzzled = 1 - theirs / theirs[world.mask].max(), ours / ours[world.mask].max()
    expected = (1 + 0.5 * sure) * (1 + 2 * puzzled)
    assert_weighs(world, Sureness(0.5, 2.0), expected)
    assert_weighs(world, MeanOne(Sureness(0.5, 2.0)), expected / expected[world.mask].mean())
    assert_weighs(world, Sureness(0.0, 0.0), torch.ones(SHAPE).double())
    with pytest.raises(ValueError, match="alpha and beta must be >= 0, got -1 and 1"):
        Sureness(-1)


def test_mean_one_of_a_weight_of_steps_keeps_the_scale():
    world = World(8)
    weight = (-2 * world.entropy(world.teachers["teacher"])).exp()
    assert_weighs(world, MeanOne(Entropy(beta=2.0)), weight / weight[world.mask].mean())
    for part, value in ((MeanOne(Entropy(beta=0.0)), 1.0), (MeanOne(Constant(0.0)), 0.0)):
        assert_weighs(world, part, torch.full(SHAPE, value).double())


def test_a_mean_is_one_among_the_steps_that_another_weight_leaves():
    """SRPO's (2604.02288): entropies of the teacher in right rollouts, which it does not teach, count nowhere."""
    world = World(8)
    weight = (-2 * world.entropy(world.teachers["teacher"])).exp()
    wrong = (REWARD == 0)[:, None] & world.mask
    own = MeanOne(Entropy(beta=2.0), Outcome(right=0.0, wrong=1.0))
    assert_weighs(world, own, weight / weight[wrong].mean())
    assert world.values(own)[wrong].mean() == pytest.approx(1.0)
    assert world.values(own)[world.mask].mean() != pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("of", "sign", "who"), [("right", -1, "student"), ("wrong", 1, "teacher")])
def test_perplexity_shares_add_up_to_one_in_each_group(of, sign, who):
    world = World(9)
    log_prob = world.log_prob(world.student if who == "student" else world.teachers["teacher"]).detach()
    mean = torch.stack([row[mask].mean() for row, mask in zip(log_prob, world.mask, strict=True)])
    expected = torch.zeros(8).double()
    for group in range(3):
        here = (group == GROUP) & ((of == "right") == REWARD)
        scores = (sign * mean[here] / 0.5).exp()
        expected[here] = scores / scores.sum()
    assert_weighs(world, PerplexityShare(of, 0.5), expected[:, None].expand(SHAPE))
    flat = world.values(PerplexityShare(of, 1e9))[:, 0].nan_to_num()
    assert all(v == pytest.approx(0) or v in (pytest.approx(1), pytest.approx(0.5)) for v in flat), "uniform"


def test_perplexity_shares_are_of_right_or_of_wrong_ones():
    with pytest.raises(ValueError, match="of is right or wrong and tau > 0, got 'all' and 1"):
        PerplexityShare("all")


def test_a_gated_mixture_of_both_kls():
    """Where the teacher agrees with nothing only the forward KL is left."""
    world = World(10)
    terms = [Term(ReverseKL(), weights=[Agreement()]), Term(ForwardKL(), weights=[Agreement(complement=True)])]
    world.teachers["teacher"] = world.student.copy()
    for ours, plain in zip(world.gradients(*terms), world.gradients(Term(ForwardKL())), strict=True):
        close(ours, plain, 1e-6)


def test_wrong_rollouts_that_a_teacher_teaches_are_not_trained_by_grpo():
    world = World(7)
    defined = torch.tensor([True, False] * (SHAPE[0] // 2))
    steps = Steps.of(world.trajectories, {"teacher": defined})
    taught = defined & (REWARD < 0.5)
    assert taught.any()
    assert torch.equal(Fallback()(steps), (~taught).float()[steps.trajectory])
    unseen = Steps.of(world.trajectories, {"teacher": torch.zeros(SHAPE[0], dtype=torch.bool)})
    assert bool((Fallback()(unseen) == 1).all()), "without any view it is GRPO"
    assert Fallback("other").streams == {"other"}


def test_the_teachers_ratio_is_capped():
    world = World(21)
    ratio = world.delta.exp()
    assert (ratio[world.mask] > 1.2).any()
    assert_weighs(world, TeacherRatio(1.2), ratio.clamp(max=1.2))
    world.teachers["teacher"] = world.student.copy()
    close(world.values(TeacherRatio())[world.mask], torch.tensor(1.0), 1e-6)
    with pytest.raises(ValueError, match=r"weight\.cap must be > 0"):
        TeacherRatio(0)


@pytest.mark.parametrize(("share", "exponent"), [(0.5, 2.0), (0.3, 0.0), (1.0, 2.0)])
def test_steps_are_drawn_by_their_entropy(share, exponent):
    """The largest of u^(1/H^a), row by row, with the draws that every part of this purpose has."""
    world = World(22)
    draws = Steps.of(world.trajectories).uniform("entropy sample").double()
    uniform = torch.full(SHAPE, torch.nan, dtype=torch.float64)
    uniform[world.mask] = draws
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for row, mask in enumerate(world.mask):
        places = mask.nonzero().flatten().tolist()
        keys = {
            t: float(uniform[row, t]) ** (1 / float(world.entropy(world.student)[row, t]) ** exponent) for t in places
        }
        for t in sorted(places, key=keys.__getitem__, reverse=True)[: max(1, int(share * len(places)))]:
            expected[row, t] = 1.0
    assert_weighs(world, EntropySample(share, exponent), expected)


@pytest.mark.slow
def test_the_first_draw_goes_by_the_entropy_to_the_power_and_evenly_at_zero():
    """Over 500 seeds: frequencies of a row's one draw, against H^a over its sum."""
    world, row = World(23), 4  # four steps
    entropy = world.entropy(world.student)[row]
    for exponent in (2.0, 0.0):
        expected = entropy**exponent / (entropy**exponent).sum()
        counts = torch.zeros(4, dtype=torch.float64)
        for seed in range(500):
            world.trajectories.seed = torch.arange(SHAPE[0]) + 1000 * seed
            counts += world.values(EntropySample(0.25, exponent))[row]
        deviation = (expected * (1 - expected) / 500).sqrt()
        assert ((counts / 500 - expected).abs() < 4 * deviation).all(), exponent


def test_a_sample_of_none_is_refused():
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\] and exponent >= 0"):
        EntropySample(0)


def test_short_right_rollouts_of_each_group():
    """Of the lengths 4, 2, 3 | 3, 4, 1 | 3, 3, where 0, 2, 5, 6, 7 are right."""
    world = World(24)
    brief = world.values(Brief())
    expected = torch.tensor([0, 0, 1, 0, 0, 1, 1, 1.0])[:, None].expand(SHAPE).double()
    close(brief[world.mask], expected[world.mask], 0)
