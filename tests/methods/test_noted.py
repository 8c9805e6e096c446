"""Weights by notes, against their formulas in float64, and TRACE's loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opd_lightning.methods.noted import Confident, Deficit, Marked
from opd_lightning.objective import ForwardKL, GroupRelative, Objective, Outcome, PolicyGradient, ReverseKL, Term
from tests.methods.test_weight import assert_weighs
from tests.methods.world import REWARD, SHAPE, World
from tests.objective.reference import close


def stated(world, **columns):
    rows = [{name: values[i] for name, values in columns.items()} for i in range(SHAPE[0])]
    world.trajectories = replace(world.trajectories, examples=rows)
    return world


def test_teachers_weigh_by_how_sure_they_say_to_be():
    """Softmax over K of c/100/τ; the same for all where one does not say, and the K add up to 1."""
    a, b = [0, 100, 50, None, 20, 80, 300, 7], [100, 0, 50, 90, None, 20, 0, 8]
    world = stated(World(12), a=a, b=b)
    pairs = [(min(x, 100) / 100, y / 100) if None not in (x, y) else (0, 0) for x, y in zip(a, b, strict=True)]
    shares = torch.tensor([math.exp(x / 0.5) / (math.exp(x / 0.5) + math.exp(y / 0.5)) for x, y in pairs]).double()
    first, second = Confident("a", ("a", "b"), tau=0.5), Confident("b", ("a", "b"), tau=0.5)
    assert_weighs(world, first, shares[:, None].expand(SHAPE))
    close((world.values(first) + world.values(second))[world.mask], torch.ones(int(world.mask.sum())).double(), 1e-6)
    with pytest.raises(ValueError, match=r"Confident: 'c' has to be among \['a', 'b'\]"):
        Confident("c", ("a", "b"))


def test_a_single_teacher_weighs_as_it_would_without_saying_so_and_equal_ones_make_a_mean():
    world = stated(World(13, ("teacher", "other")), a=[5] * 8, b=[5] * 8)
    alone = Term(ReverseKL(), weights=[Confident("a", ("a",))])
    for ours, plain in zip(world.gradients(alone), world.gradients(Term(ReverseKL())), strict=True):
        assert torch.equal(ours, plain)
    both = [Term(ReverseKL(), n, [Confident(c, ("a", "b"))]) for n, c in (("teacher", "a"), ("other", "b"))]
    halves = [Term(ReverseKL(), name, coefficient=0.5) for name in ("teacher", "other")]
    for ours, plain in zip(world.gradients(*both), world.gradients(*halves), strict=True):
        close(ours, plain, 1e-6)


def test_marked_steps_weigh_other_than_the_rest():
    world = World(14)
    marked = world.trajectories.channels["spans"] > 0
    assert_weighs(world, Marked(0.25, 2.0), torch.where(marked, 0.25, 2.0).double())
    for ours, plain in zip(
        world.gradients(Term(ReverseKL(), weights=[Marked(1, 1)])), world.gradients(Term(ReverseKL())), strict=True
    ):
        assert torch.equal(ours, plain)
    with pytest.raises(ValueError, match="inside and outside must be >= 0, got -1 and 0"):
        Marked(-1)


def trace(share):
    """The two terms of TRACE at λ = share·w₀, w₀ = ½."""
    key = [Marked(), Outcome(right=1.0, wrong=0.0)]
    grpo = Term(PolicyGradient(GroupRelative()), None, [Marked(1 - share, 1.0)], normalizer="trajectories")
    return [grpo, Term(ForwardKL(clip=0.05), weights=key, coefficient=0.5 * share, normalizer="trajectories")]


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_trace_trains_marked_steps_of_right_rollouts_by_a_clipped_divergence_over_the_length(share):
    world = World(15)
    marked, is_right = world.trajectories.channels["spans"] > 0, (REWARD >= 0.5)[:, None]
    per_step = world.mask.double() / world.mask.sum(1, keepdim=True) / SHAPE[0]
    log_p, log_q = world.log_probs(world.student), world.log_probs(world.teachers["teacher"]).detach()
    divergence = (log_q.exp() * (log_q - log_p)).clamp(max=0.05).sum(-1)
    grpo = -world.group_relative * world.log_prob(world.student) * torch.where(marked, 1 - share, 1.0)
    wanted = (per_step * (grpo + 0.5 * share * (marked & is_right) * divergence)).sum()
    for ours, formula in zip(world.gradients(*trace(share)), world.student.gradients(wanted), strict=True):
        close(ours, formula, 1e-5)


def test_trace_without_its_share_is_grpo_and_asks_no_teacher():
    world = World(16)
    grpo = Term(PolicyGradient(GroupRelative()), None, normalizer="trajectories")
    for ours, plain in zip(world.gradients(*trace(0.0)), world.gradients(grpo), strict=True):
        assert torch.equal(ours, plain)
    assert Objective(trace(0.0)).teachers() == set()
    world.trajectories.channels["spans"].zero_()
    for ours, plain in zip(world.gradients(*trace(0.7)), world.gradients(grpo), strict=True):
        assert torch.equal(ours, plain)


def test_teachers_weigh_by_what_a_rollout_lacks():
    utility, integrity = [1, 0, 0.5, None, 0.2, 1, 0, 0.9], [1, 0, 0.8, 0.3, None, 0, 1, 0.9]
    world = stated(World(17, ("teacher", "other")), utility=utility, integrity=integrity)
    known = [[1 if metric is None else metric for metric in metrics] for metrics in (utility, integrity)]
    pairs = [(1 - u, 1 - i) for u, i in zip(*known, strict=True)]
    shares = [torch.tensor([pair[k] / max(sum(pair), 1) for pair in pairs]).double() for k in range(2)]
    weights = [Deficit(of) for of in ("utility", "integrity")]
    for weight, share in zip(weights, shares, strict=True):
        assert_weighs(world, weight, share[:, None].expand(SHAPE))
    both = [Term(ReverseKL(), name, [w]) for name, w in zip(("teacher", "other"), weights, strict=True)]
    assert [shares[k][0].item() for k in range(2)] == [0, 0], "nothing is lost where nothing is missing"
    assert float(world.loss(*both, rows=torch.tensor([0])).detach()) == 0
    with pytest.raises(ValueError, match=r"Deficit: 'c' has to be among \['utility', 'integrity'\]"):
        Deficit("c")


def test_nothing_achieved_by_equal_teachers_is_a_single_one():
    world = stated(World(18, ("teacher", "other")), utility=[0] * 8, integrity=[0] * 8)
    world.teachers["other"] = world.teachers["teacher"]
    both = [Term(ReverseKL(), n, [Deficit(of)]) for n, of in (("teacher", "utility"), ("other", "integrity"))]
    for ours, plain in zip(world.gradients(*both), world.gradients(Term(ReverseKL())), strict=True):
        close(ours, plain, 1e-6)
