"""What is found behind states that were visited, against brute force, and the parts that read it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from opd_lightning.methods.branches import (
    Audited,
    LogRatioPlusSureness,
    LookAhead,
    SpeculativeAudit,
    chunks_of,
    similarity,
    standardized,
)
from opd_lightning.objective import CrossEntropy, ForwardKL, LogRatio, Objective, PolicyGradient, Term
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Initial, Teacher
from tests import tiny
from tests.methods.test_rollouts import Sees
from tests.methods.world import World
from tests.objective.reference import close
from tests.tiny import log_softmax


def looking(student, teacher, folder, callback=None, part=None, steps=1):
    part = part or LogRatioPlusSureness()
    module = tiny.make_module(
        student, teacher, Objective([Term(PolicyGradient(part))]), rollout=Rollout(batch_size=4, horizon=6)
    )
    sees = Sees()
    tiny.fit(module, folder, callbacks=[callback, sees] if callback else [sees], steps=steps)
    return module, sees.batches


def test_a_step_is_worth_how_sure_the_teacher_is_behind_it(tiny_student, tiny_teacher, tmp_path):
    """Each candidate is read by itself."""
    _, (batch,) = looking(tiny_student, tiny_teacher, tmp_path, LookAhead(candidates=3, threshold=0.5))
    fresh = tiny.make_module(tiny_student, tiny_teacher)
    log_p = log_softmax(fresh, "student", batch)
    entropy, likely = -(log_p.exp() * log_p).sum(-1), log_p.topk(3).indices
    found = 0
    for row in range(len(batch)):
        for step in range(batch.mask.shape[1]):
            value = float(batch.channels["sureness"][row, step])
            last = step + 1 == batch.mask.shape[1] or not batch.mask[row, step + 1]
            own = likely[row, step] == batch.actions[row, step]
            if not batch.mask[row, step] or last or entropy[row, step] <= 0.5 or not own.any():
                assert value == 0
                continue
            sure = []
            for candidate in likely[row, step]:
                one = batch.select(torch.tensor([row]))
                actions, mask = one.actions.clone(), torch.zeros_like(one.mask)
                actions[0, step], mask[0, step + 1] = candidate, True
                changed = replace(one, actions=actions, mask=mask)
                sure.append(float(log_softmax(fresh, "teacher", changed)[0, step + 1].exp().max()))
            sure = torch.tensor(sure)
            expected = ((sure - sure.mean()) / (sure.std(correction=0) + 1e-6))[own]
            close(torch.tensor(value), expected.squeeze(), 1e-3)
            found += 1
    assert found > 3


@pytest.mark.parametrize(
    ("callback", "part"),
    [(LookAhead(threshold=1e9), LogRatioPlusSureness()), (LookAhead(), LogRatioPlusSureness(coefficient=0.0))],
)
def test_without_a_puzzle_or_a_coefficient_it_is_the_log_ratio(callback, part, tiny_student, tiny_teacher, tmp_path):
    ours, _ = looking(tiny_student, tiny_teacher, tmp_path / "a", callback, part)
    plain, _ = looking(tiny_student, tiny_teacher, tmp_path / "b", part=LogRatio())
    for one, other in zip(ours.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_sureness_has_mean_zero_and_none_where_all_are_alike():
    values = torch.rand(5, 4, dtype=torch.float64)
    own = torch.eye(4, dtype=torch.bool)
    scores = torch.stack([standardized(values, row.expand(5, 4)) for row in own])
    close(scores.mean(0), torch.zeros(5), 1e-6)
    assert not standardized(torch.full((2, 4), 0.3), own[:2]).any()
    assert not standardized(torch.full((2, 4), math.nan), own[:2]).any()
    assert not standardized(values[:1], torch.zeros(1, 4, dtype=torch.bool)).any()


def test_the_advantage_is_the_sum():
    world = World(1)
    advantage = world.delta + 0.3 * world.trajectories.channels["sureness"].double()
    for ours, formula in zip(
        world.gradients(Term(PolicyGradient(LogRatioPlusSureness(0.3)))), world.expected(advantage), strict=True
    ):
        close(ours, formula, 1e-6)


def test_settings_of_branches_are_checked(tiny_student, tiny_teacher, tmp_path):
    with pytest.raises(ValueError, match=r"candidates=1 must be >= 2"):
        LookAhead(candidates=1)
    with pytest.raises(ValueError, match=r"chunk=0 must be >= 1"):
        SpeculativeAudit(chunk=0)
    with pytest.raises(ValueError, match=r"needs 'sureness': add the callback LookAhead to trainer\.callbacks"):
        looking(tiny_student, tiny_teacher, tmp_path)


# -- audits ----------------------------------------------------------------------------------------------------------


def audited(student, teacher, folder, **settings):
    terms = [
        Term(CrossEntropy(), teacher=None, weights=[Audited()]),
        Term(ForwardKL(), teacher="reference", weights=[Audited(complement=True)], coefficient=0.1),
    ]
    teachers = {"teacher": teacher, "reference": Teacher(Initial())}
    module = tiny.make_module(student, teachers, Objective(terms), rollout=Rollout(batch_size=4, horizon=9))
    callback, sees = SpeculativeAudit(anchors=2, chunk=3, **settings), Sees()
    tiny.fit(module, folder, callbacks=[callback, sees])
    return sees.batches[0]


def frozen(folder):
    return tiny.Teacher(tiny.Frozen(tiny.Pretrained(str(folder))))


def test_chunks_are_worth_how_alike_the_teacher_goes_on(tiny_student, tiny_teacher, tmp_path):
    batch = audited(tiny_student, frozen(tiny_teacher), tmp_path / "a", continuations=3)
    audit = batch.channels["audit"]
    assert ((audit > 0) <= batch.mask).all()
    assert (audit < 1).all()
    fresh = tiny.make_module(tiny_student, tiny_teacher)
    log_p = log_softmax(fresh, "student", batch)
    entropy, texts = -(log_p.exp() * log_p).sum(-1), fresh.decode_steps(batch)
    alone = audited(tiny_student, frozen(tiny_teacher), tmp_path / "b", continuations=0).channels["audit"]
    for row, mask in enumerate(batch.mask):
        inside = torch.zeros(int(mask.sum()), dtype=torch.bool)
        for begin, end in chunks_of(entropy[row][mask], 2, 3):
            inside[begin:end] = True
            mean = batch.behavior_log_probs[row][mask][begin:end].mean().exp()
            close(alone[row][mask][begin:end], mean.expand(end - begin), 1e-5)
            # what is above the student's own share is the likeness, of three texts
            likeness = audit[row][mask][begin] * 4 - mean
            assert -1e-5 <= float(likeness) <= 3 + 1e-5
            assert len("".join(texts[row][begin:end])) >= 1
        assert torch.equal(audit[row][mask] > 0, inside), "chunks and the rest are the whole rollout"


def test_the_student_as_teacher_goes_on_as_it_did_where_it_is_greedy(tiny_student, tmp_path):
    """At temperature 0 the same weights write the same words: φ = 1."""
    teachers = {"teacher": frozen(tiny_student), "reference": Teacher(Initial())}
    terms = [Term(CrossEntropy(), teacher=None, weights=[Audited()])]
    rollout = Rollout(batch_size=4, horizon=9, temperature=0.0)
    module, sees = tiny.make_module(tiny_student, teachers, Objective(terms), rollout=rollout), Sees()
    tiny.fit(module, tmp_path, callbacks=[SpeculativeAudit(anchors=1, chunk=20, continuations=2), sees])
    (batch,) = sees.batches
    for row, mask in enumerate(batch.mask):
        mean = batch.behavior_log_probs[row][mask].mean().exp()
        close(batch.channels["audit"][row][mask], ((2 + mean) / 3).expand(int(mask.sum())), 1e-5)


def test_chunks_do_not_overlap():
    entropy = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.3, 0.0, 0.7])
    assert chunks_of(entropy, 2, 3) == [(0, 3), (5, 7)]
    assert chunks_of(entropy, 9, 1) == [(i, i + 1) for i in range(7)]
    assert chunks_of(entropy[:0], 3, 3) == []
    assert chunks_of(entropy, 1, 50) == [(0, 7)]


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("kitten", "sitting", 3), ("abc", "abc", 0), ("abc", "", 3), ("", "", 0), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_similarity_is_that_of_the_edit_distance(one, other, distance):
    longest = max(len(one), len(other), 1)
    assert similarity(one, other) == similarity(other, one) == pytest.approx(1 - distance / longest)


def test_the_loss_of_an_audit():
    world = World(3)
    audit = world.trajectories.channels["audit"].double()
    p, q = (world.log_probs(policy) for policy in (world.student, world.teachers["teacher"]))
    kl = (q.exp() * (q - p)).sum(-1)
    terms = [
        Term(CrossEntropy(), teacher=None, weights=[Audited()]),
        Term(ForwardKL(), weights=[Audited(complement=True)], coefficient=0.1),
    ]
    loss = torch.where(audit > 0, -audit * world.log_prob(world.student), 0.1 * kl)
    expected = world.student.gradients(loss[world.mask].sum() / world.mask.sum())
    for ours, formula in zip(world.gradients(*terms), expected, strict=True):
        close(ours, formula, 1e-6)
