"""Signals over a teacher's own vocabulary, against their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

from opd_lightning.methods.cross_tokenizer import ULD, HybridULD
from opd_lightning.objective import JSD, CrossEntropy, LogLinear, Objective, Term
from tests.methods.world import SHAPE, V, World
from tests.objective.reference import close

W = 8


def dense(world, temperature=1.0):
    """Probabilities of student and teacher, ``[B, T, V]`` and ``[B, T, W]``."""
    every = torch.ones(SHAPE, dtype=torch.bool)
    policies = world.student, world.teachers["teacher"]
    p, q = ((policy.logits(every) / temperature).softmax(-1) for policy in policies)
    return p.view(*SHAPE, V), q.detach().view(*SHAPE, W)


def distance(p, q):
    """One state, by sorted lists."""
    one, other = (sorted(side, key=lambda x: -float(x.detach())) for side in (p, q))
    zero = p.new_zeros(())
    pairs = zip(
        one + [zero] * max(0, len(other) - len(one)), other + [zero] * max(0, len(one) - len(other)), strict=True
    )
    return sum(((a - b).abs() for a, b in pairs), zero)


def gold(world, beta, share):
    """Mean over trained steps of the hybrid loss at paired ones, as TRL computes it, step by step."""
    p, q = dense(world)
    own, other = world.matched.tolist()
    share = len(other) / W if share is None else share
    total = p.new_zeros(())
    for row, step in world.mask.nonzero().tolist():
        if not world.paired[row, step]:
            continue
        rest = world.rest[row, step].double().exp()
        one, two = p[row, step] * rest[0], q[row, step] * rest[1]
        matched = p.new_zeros(())
        for i, j in zip(own, other, strict=True):
            a, b = one[i], two[j]
            m = (1 - beta) * a + beta * b
            if beta in (0.0, 1.0):  # KL(q‖p) and KL(p‖q)
                matched = matched + (b * (b / a).log() if beta == 0 else a * (a / b).log())
            else:
                matched = matched + beta * b * (b / m).log() + (1 - beta) * a * (a / m).log()
        left = one[[i for i in range(V) if i not in own]], two[[j for j in range(W) if j not in other]]
        total = total + share * matched + (1 - share) * distance(*left)
    return total / world.mask.sum()


def compared(world, signal, expected):
    loss = world.loss(Term(signal))
    close(loss.detach(), expected.detach(), 1e-6)
    for ours, formula in zip(world.student.gradients(loss), world.student.gradients(expected), strict=True):
        close(ours, formula, 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_uld(temperature):
    world = World(1, aligned=W)
    p, q = dense(world, temperature)
    values = [distance(p[i, t], q[i, t]) for i, t in (world.mask & world.paired).nonzero().tolist()]
    compared(world, ULD(temperature), torch.stack(values).sum() / world.mask.sum())


@pytest.mark.parametrize("share", [None, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.3, 1.0])
def test_hybrid(beta, share):
    world = World(2, aligned=W)
    compared(world, HybridULD(beta, share), gold(world, beta, share))


def test_of_equal_vocabularies_the_hybrid_is_the_jsd():
    world = World(3)
    plain = world.loss(Term(JSD(0.4)))
    world.aligned, world.paired = V, torch.ones(SHAPE, dtype=torch.bool)
    world.rest, world.matched = torch.zeros(*SHAPE, 2), torch.arange(V).expand(2, V)
    hybrid = world.loss(Term(HybridULD(0.4)))
    close(hybrid.detach(), plain.detach(), 1e-7)
    for ours, theirs in zip(world.student.gradients(hybrid), world.student.gradients(plain), strict=True):
        close(ours, theirs, 1e-7)


def test_an_equal_distribution_has_no_distance_whatever_its_ids():
    world = World(4, aligned=V)
    with torch.no_grad():
        teacher = world.teachers["teacher"]
        teacher.hidden.copy_(world.student.hidden)
        order = torch.randperm(V, generator=torch.Generator().manual_seed(0))
        for name in ("weight", "bias"):
            getattr(teacher.layer, name).copy_(getattr(world.student.layer, name)[order])
    assert abs(float(world.loss(Term(ULD())))) < 1e-12


def test_where_nothing_is_paired_the_loss_is_zero():
    world = World(5, aligned=W)
    world.paired = torch.zeros(SHAPE, dtype=torch.bool)
    world.rest = torch.full((*SHAPE, 2), math.nan)
    for signal in (ULD(), HybridULD()):
        loss = world.loss(Term(signal), Term(CrossEntropy(), None, coefficient=0.0))
        assert float(loss) == 0
        assert all(not gradient.any() for gradient in world.student.gradients(loss))


def test_refusals():
    with pytest.raises(ValueError, match=r"signal\.temperature must be > 0, got 0"):
        ULD(0)
    with pytest.raises(ValueError, match=r"signal\.beta and share must be in \[0, 1\], got 0\.5 and 2"):
        HybridULD(share=2)
    with pytest.raises(ValueError, match=r"the weights of model\.teachers\.teacher have to be OtherTokenizer"):
        Objective([Term(ULD())]).check({"teacher"})
    with pytest.raises(ValueError, match=r"\.target: ULD compares two vocabularies; a target has one"):
        Objective([Term(ULD(), target=LogLinear({"teacher": 1.0}))]).check({"teacher"}, aligned={"teacher": True})
    with pytest.raises(ValueError, match="HybridULD needs 'behavior'"):
        Objective([Term(HybridULD())]).check({"teacher"}, {"categorical"}, {"dataset"}, aligned={"teacher": True})
    Objective([Term(ULD())]).check({"teacher"}, {"categorical"}, {"dataset"}, aligned={"teacher": True})
