"""Signals of single papers, against their formulas in float64."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.methods.signal import BoundedJSD, Contrast, Unlikelihood
from opd_lightning.objective import JSD, CrossEntropy, Support, Term
from tests.methods.world import World
from tests.objective.reference import close


def loss_of(world, signal):
    loss = world.loss(Term(signal, None))
    return loss.detach(), world.student.gradients(loss)


def mean(world, values):
    return values[world.mask].mean()


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_unlikelihood(margin):
    world = World(1)
    p = world.log_prob(world.student).exp()
    wanted = mean(world, torch.where(p > margin, -(1 - p).log(), 0.0))
    value, gradients = loss_of(world, Unlikelihood(margin))
    close(value, wanted, 1e-6)
    for ours, formula in zip(gradients, world.student.gradients(wanted), strict=True):
        close(ours, formula, 1e-6)
    assert {bool(x) for x in (p > 0.2)[world.mask]} == {True, False}


def test_unlikelihood_lowers_what_it_unlearns_and_is_bounded():
    world = World(2)
    world.trajectories.actions = world.log_probs(world.student).argmax(-1)
    with torch.no_grad():
        world.student.layer.bias.mul_(100)
    value, gradients = loss_of(world, Unlikelihood())
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    with pytest.raises(ValueError, match=r"signal\.margin must be in \[0, 1\), got 1"):
        Unlikelihood(margin=1)


def test_nothing_above_the_margin_has_no_loss():
    world = World(3)
    world.trajectories.actions = world.log_probs(world.student).argmin(-1)
    assert float(loss_of(world, Unlikelihood(0.9))[0]) == 0


@pytest.mark.parametrize("focus", [0.5, 2.0, 3.0])
def test_a_focal_cross_entropy(focus):
    world = World(4)
    log_p = world.log_prob(world.student)
    wanted = mean(world, -((1 - log_p.exp()) ** focus) * log_p)
    value, gradients = loss_of(world, CrossEntropy(focus))
    close(value, wanted, 1e-6)
    for ours, formula in zip(gradients, world.student.gradients(wanted), strict=True):
        close(ours, formula, 1e-6)


def test_without_a_focus_it_is_the_plain_cross_entropy():
    world = World(5)
    value, _ = loss_of(world, CrossEntropy())
    close(value, -mean(world, world.log_prob(world.student)), 1e-6)
    with pytest.raises(ValueError, match=r"signal\.focus must be >= 0, got -1"):
        CrossEntropy(-1)


def bounded(log_p, log_q, low, high, beta):
    """The formula, by ratios of probabilities: q̃ = p·clip(q/p, low, high), not normalized."""
    p = log_p.exp()
    q = p.detach() * (log_q.exp() / p.detach()).clamp(low, high)
    if beta == 1:
        return (p * (p / q).log()).sum(-1)
    m = beta * q + (1 - beta) * p
    return (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(-1)


def restricted(log_p, log_q, k):
    """The student's k likeliest ids and the rest."""
    ids = log_p.topk(k).indices
    rest = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, ids, False)

    def cut(log_probs):
        tail = (log_probs.exp() * rest).sum(-1, keepdim=True).log()
        return torch.cat([log_probs.gather(-1, ids), tail], -1)

    return cut(log_p), cut(log_q)


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize(("low", "high", "beta"), [(0.6, None, 1.0), (0.0, 1.2, 1.0), (0.7, 1.3, 0.5)])
def test_a_teacher_within_bounds_of_the_student(low, high, beta, k):
    world = World(6)
    support = Support() if k is None else Support("student", k)
    log_p, log_q = world.log_probs(world.student), world.log_probs(world.teachers["teacher"]).detach()
    if k is not None:
        log_p, log_q = restricted(log_p, log_q, k)
    wanted = mean(world, bounded(log_p, log_q, low, 1e9 if high is None else high, beta))
    loss = world.loss(Term(BoundedJSD(low, high, beta, support)))
    close(loss.detach(), wanted, 1e-6)
    for ours, formula in zip(world.student.gradients(loss), world.student.gradients(wanted), strict=True):
        close(ours, formula, 1e-5)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_without_bounds_or_within_them_it_is_the_jsd(beta):
    world = World(7)
    plain = world.gradients(Term(JSD(beta)))
    for signal in (BoundedJSD(0.0, None, beta), BoundedJSD(1e-9, 1e9, beta)):
        for ours, formula in zip(world.gradients(Term(signal)), plain, strict=True):
            close(ours, formula, 1e-6)
    with pytest.raises(ValueError, match="need 0 <= low <= 1 <= high, got 2 and None"):
        BoundedJSD(2)


def test_contrast_is_a_hinge_between_two_distances():
    world = World(5, ("teacher", "wrong"))
    log_p = world.log_prob(world.student)
    right, wrong = (world.log_prob(world.teachers[name]).detach() for name in ("teacher", "wrong"))
    expected = (0.5 + (log_p - right).abs() - (log_p - wrong).abs()).clamp(min=0)[world.mask].mean()
    loss = world.loss(Term(Contrast()))
    close(loss, expected, 1e-6)
    for one, other in zip(world.student.gradients(loss), world.student.gradients(expected), strict=True):
        close(one, other, 1e-7)
    alike = world.loss(Term(Contrast("teacher", 0.3)))
    assert alike.item() == pytest.approx(0.3)
    with pytest.raises(ValueError, match="margin must be >= 0"):
        Contrast(margin=-1.0)
