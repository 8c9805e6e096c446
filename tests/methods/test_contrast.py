"""Advantages of several streams, against their formulas in float64 and against what they reduce to."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.distribution import Stream
from opd_lightning.methods.contrast import AsymmetricGain, Extrapolated, Preference, RewardTimesContrast
from opd_lightning.methods.weight import TeacherRatio
from opd_lightning.objective import (
    GroupRelative,
    Length,
    LogRatio,
    Objective,
    PolicyGradient,
    RewardTimesLogRatio,
    Term,
)
from tests.methods.world import GROUP, SHAPE, World
from tests.objective.reference import close


def gradients(world, advantage, **settings):
    return world.gradients(Term(PolicyGradient(advantage), **settings))


def assert_equal(world, one, other):
    for a, b in zip(gradients(world, one), gradients(world, other), strict=True):
        assert torch.equal(a, b)


def without(world, name, rows):
    """What `Objective` makes of the batch where a teacher is not defined for some rows."""
    student, streams = world.queried(torch.arange(SHAPE[0]))
    available = torch.ones(SHAPE[0], dtype=torch.bool)
    available[rows] = False
    streams[name] = Stream(streams[name].distribution, available)

    def gradients(term):
        return world.student.gradients(Objective([term], chunk_steps=3)(student, streams, world.trajectories)[0])

    return gradients


# -- CEPO ---------------------------------------------------------------------------------------------------------


def test_what_the_right_answer_favors_and_a_wrong_one_does_not_counts_more():
    world = World(1, ("teacher", "rejected"))
    right, wrong = (world.log_prob(world.teachers[name]).detach() for name in ("teacher", "rejected"))
    factor = ((right - wrong).exp() ** world.group_relative.sign()).clamp(0.8, 1.2)
    advantage = world.group_relative * (0.3 + 0.7 * factor)
    close(world.values(RewardTimesContrast(0.7, 0.2))[world.mask], advantage[world.mask], 1e-6)
    for ours, formula in zip(gradients(world, RewardTimesContrast(0.7, 0.2)), world.expected(advantage), strict=True):
        close(ours, formula, 1e-6)
    assert ((advantage.sign() == world.group_relative.sign())[world.mask]).all(), "the verifier sets the sign"


def test_a_contrast_of_equals_or_without_a_share_is_grpo():
    world = World(2, ("teacher", "rejected"))
    assert_equal(world, RewardTimesContrast(0.0), GroupRelative())
    assert "teacher" not in RewardTimesContrast(0.0).needs
    assert not RewardTimesContrast(0.0).streams
    world.teachers["rejected"] = world.teachers["teacher"]
    assert_equal(world, RewardTimesContrast(0.5), GroupRelative())


def test_against_the_self_without_context_it_is_rlsd():
    world = World(3, ("teacher", "rejected"))
    world.teachers["rejected"] = world.student.copy()
    for ours, rlsd in zip(
        gradients(world, RewardTimesContrast(0.5)), gradients(world, RewardTimesLogRatio(0.5)), strict=True
    ):
        close(ours, rlsd, 1e-6)


@pytest.mark.parametrize(("alone", "other"), [("student", RewardTimesLogRatio(0.5)), ("nothing", GroupRelative())])
def test_without_a_rejected_rollout_it_is_rlsd_or_grpo(alone, other):
    world = World(4, ("teacher", "rejected"))
    found = without(world, "rejected", slice(None))
    ours = found(Term(PolicyGradient(RewardTimesContrast(0.5, alone=alone))))
    for one, plain in zip(ours, gradients(world, other), strict=True):
        close(one, plain, 1e-6)


def test_an_unknown_way_to_be_alone_is_refused():
    with pytest.raises(ValueError, match=r"advantage\.alone is student or nothing, not 'rlsd'"):
        RewardTimesContrast(alone="rlsd")


# -- AMR-SD -------------------------------------------------------------------------------------------------------


def test_reflection_adds_to_the_verifiers_word():
    """By a loop over steps, with a dead zone and a clip that both bite."""
    world = World(5, ("reflected",))
    gain = (world.log_prob(world.teachers["reflected"]) - world.log_prob(world.student)).detach()
    advantage = torch.zeros(SHAPE, dtype=torch.float64)
    for place in world.mask.nonzero().tolist():
        a, i = float(world.group_relative[tuple(place)]), min(max(float(gain[tuple(place)]), -0.9), 0.9)
        change = 0.5 * max(i - 0.2, 0) if a >= 0 else 0.3 * max(-i - 0.2, 0)
        assert change >= 0
        advantage[tuple(place)] = a * (1 + change)
    part = AsymmetricGain(right=0.5, wrong=0.3, dead_zone=0.2, clip=0.9)
    assert (gain[world.mask].abs() > 0.9).any()
    assert (gain[world.mask].abs() < 0.2).any()
    for ours, formula in zip(gradients(world, part, teacher=None), world.expected(advantage), strict=True):
        close(ours, formula, 1e-6)
    assert not world.group_relative[GROUP == 2].any(), "a group that is all right has no gradient"


def test_without_reflection_it_is_grpo():
    """At the end of both decays no teacher is asked; where there was nothing to reflect on, its row is plain."""
    world = World(6, ("reflected",))
    off = AsymmetricGain(right=0.0, wrong=0.0)
    assert not off.streams
    for ours, plain in zip(
        gradients(world, off, teacher=None), gradients(world, GroupRelative(), teacher=None), strict=True
    ):
        assert torch.equal(ours, plain)
    part, rows = AsymmetricGain(), slice(None)
    ours = without(world, "reflected", rows)(Term(PolicyGradient(part), teacher=None))
    for one, plain in zip(ours, gradients(world, GroupRelative(), teacher=None), strict=True):
        close(one, plain, 1e-9)


def test_gains_that_could_turn_the_sign_and_the_terms_own_teacher_are_refused():
    with pytest.raises(ValueError, match="right, wrong and dead_zone must be >= 0 and clip > 0, got -1"):
        AsymmetricGain(right=-1)
    with pytest.raises(ValueError, match="'teacher' is the term's own"):
        AsymmetricGain(teacher="teacher")


# -- The Extrapolation Cliff ----------------------------------------------------------------------------------------


def test_extrapolation_past_the_teacher_with_a_capped_ratio():
    world = World(7, ("teacher", "base"))
    q, b = (world.log_prob(world.teachers[name]).detach() for name in ("teacher", "base"))
    p = world.log_prob(world.student).detach()
    advantage = 1.25 * (q - b) - (p - b)
    close(world.values(Extrapolated(1.25))[world.mask], advantage[world.mask], 1e-6)
    term = Term(PolicyGradient(Extrapolated(1.25), clip=None, ratio="none"), weights=[TeacherRatio(1.1)])
    expected = world.expected((q - p).exp().clamp(max=1.1) * advantage)
    assert ((q - p).exp()[world.mask] > 1.1).any()
    for ours, formula in zip(world.gradients(term), expected, strict=True):
        close(ours, formula, 1e-6)


def test_at_strength_one_the_base_cancels_and_is_not_asked():
    world = World(9)
    assert_equal(world, Extrapolated(1.0), LogRatio())
    assert not Extrapolated(1.0).streams
    assert Extrapolated(1.1).streams == {"base"}
    with pytest.raises(ValueError, match=r"advantage\.strength must be > 0"):
        Extrapolated(0)


def test_where_the_base_is_not_defined_nothing_is_extrapolated():
    world = World(8, ("teacher", "base"))
    ours = without(world, "base", slice(None))(Term(PolicyGradient(Extrapolated(1.25))))
    for one, plain in zip(ours, gradients(world, LogRatio()), strict=True):
        close(one, plain, 1e-9)


# -- PBSD -----------------------------------------------------------------------------------------------------------

PAIRED = {"source": torch.tensor([1, 0, 0, 0, 1, 0, 1, 0]), "sources": ("student", "teacher")}
"""The first group has one of the teacher's and two of the student's, as has the second; the third one of each."""
PAIRS = [(0, 1), (4, 3), (6, 7)]


def preference_loss(world, beta):
    """Mean of −log σ of the margin over the pairs, with gradient, by a loop."""
    q, p = world.log_prob(world.teachers["teacher"]).detach(), world.log_prob(world.student)
    away = torch.where(world.mask, p - q, 0.0).sum(1)
    return -torch.stack([(beta * (away[i] - away[j])).sigmoid().log() for i, j in PAIRS]).mean()


def pair_term(beta):
    """A mean of the batch's eight trajectories; those without a partner count in it."""
    signal = PolicyGradient(Preference(beta), clip=None, ratio="none")
    return Term(signal, weights=[Length()], normalizer="trajectories", coefficient=8 / len(PAIRS))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_pairs_are_told_apart_as_by_the_logistic_loss(beta):
    world = World(10, **PAIRED)
    expected = world.student.gradients(preference_loss(world, beta))
    for ours, formula in zip(world.gradients(pair_term(beta)), expected, strict=True):
        close(ours, formula, 1e-6)
    signs = world.values(Preference(beta)).sign()
    for better, worse in PAIRS:
        assert (signs[better][world.mask[better]] == 1).all()
        assert (signs[worse][world.mask[worse]] == -1).all()
    for alone in (2, 5):
        assert not signs[alone][world.mask[alone]].any()


def test_a_teacher_that_is_the_student_has_no_margin():
    world = World(11, **PAIRED)
    world.teachers["teacher"] = world.student.copy()
    assert float(preference_loss(world, 1.0).detach()) == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    values = world.values(Preference(1.0))
    for better, worse in PAIRS:
        close(values[better][world.mask[better]], torch.tensor(0.5), 1e-6)
        close(values[worse][world.mask[worse]], torch.tensor(-0.5), 1e-6)


def test_nobody_preferred_and_no_temperature():
    world = World(12)
    assert not world.values(Preference())[world.mask].any()
    with pytest.raises(ValueError, match=r"advantage\.beta must be > 0, got 0"):
        Preference(0)
