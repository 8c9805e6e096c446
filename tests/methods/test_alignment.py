"""Whether a teacher pulls towards success: the formulas by loops, and what a run makes of them."""

from __future__ import annotations

import math

import pytest
import torch

from opd_lightning.methods.alignment import Alignment, advantage, alignment
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.reward import CallableReward
from opd_lightning.rollout_settings import Rollout
from tests.callbacks import toy
from tests.tiny import LongerIsBetter, fit, make_module

S, K = 5, 4


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.rand(S, K, generator=generator, dtype=torch.float64).softmax(-1) * 0.9 for _ in range(2))
    return p, q, torch.rand(S, K, generator=generator, dtype=torch.float64)


def test_cosine_and_advantage_are_those_of_loops():
    p, q, success = drawn()
    cosine, decided = alignment(p, q, success)
    gained = advantage(p, q, success)
    for s in range(S):
        own = [float(x) / float(p[s].sum()) for x in p[s]]
        gap = [math.log(float(a)) - math.log(float(b)) for a, b in zip(p[s], q[s], strict=True)]
        mean = sum(a * float(b) for a, b in zip(own, success[s], strict=True))
        middle = sum(a * b for a, b in zip(own, gap, strict=True))
        ideal = [a * (float(b) - mean) for a, b in zip(own, success[s], strict=True)]
        pull = [-a * (b - middle) for a, b in zip(own, gap, strict=True)]
        dot = sum(a * b for a, b in zip(ideal, pull, strict=True))
        norms = [math.sqrt(sum(x * x for x in side)) for side in (ideal, pull)]
        assert float(cosine[s]) == pytest.approx(dot / norms[0] / norms[1])
        teacher = sum(float(a) * float(b) for a, b in zip(q[s], success[s], strict=True)) / float(q[s].sum())
        assert float(gained[s]) == pytest.approx(teacher - mean)
    assert decided.all()


def test_a_teacher_that_prefers_what_succeeds_is_aligned():
    p, _, success = drawn(1)
    q = (p.log() + 3.0 * success).softmax(-1)
    assert torch.allclose(alignment(p, q, success)[0], torch.ones(S, dtype=torch.float64))
    assert torch.allclose(alignment(p, (p.log() - success).softmax(-1), success)[0], -torch.ones(S).double())
    assert (advantage(p, q, success) > 0).all()


def test_neither_scale_nor_a_constant_matters():
    p, q, success = drawn(2)
    expected = alignment(p, q, success)[0]
    for changed in (alignment(p, q * 0.3, success), alignment(p, q, 0.5 * success + 0.2)):
        assert torch.allclose(changed[0], expected)
    wider = [torch.cat([side, torch.zeros(S, 1)], 1) for side in (p, q, success)]
    assert torch.allclose(alignment(*wider)[0], expected), "places without an action do not count"


def test_states_where_nothing_depends_on_the_action_are_left_out():
    p, q, success = drawn(3)
    success[1] = 0.7
    q[2] = p[2]
    assert alignment(p, q, success)[1].tolist() == [True, False, False, True, True]


def begins_with_a_digit(completion, example):
    return float(completion[:1].isdigit())


class Watched(Alignment):
    """Keeps what it found."""

    def _success(self, module, some, step, action, wanted):
        success = super()._success(module, some, step, action, wanted)
        self.found = step, action, wanted, success
        return success


def made(student, teacher, **settings):
    reward = CallableReward("tests.methods.test_alignment.begins_with_a_digit")
    return make_module(student, teacher, reward=reward, **settings)


@pytest.mark.parametrize("horizon", [1, 4])
def test_success_is_what_follows_an_action(tiny_student, tiny_teacher, tmp_path, horizon):
    """A reward of the first character alone: behind it all actions are as good, at it those that write a digit."""
    module = made(tiny_student, tiny_teacher, rollout=Rollout(batch_size=8, horizon=horizon))
    watched = Watched(states=8, visits=2, most=24, floor=0.0)
    fit(module, tmp_path, callbacks=[watched])
    step, action, wanted, success = watched.found
    assert wanted.all()
    assert (step == 0).any()
    for s in range(len(step)):
        if step[s] == 0:
            texts = [module.written_as([int(token)]) for token in action[s]]
            # an empty token leaves the first character to what follows
            for text, value in zip(texts, success[s], strict=True):
                if text or horizon == 1:
                    assert float(value) == begins_with_a_digit(text, {})
        elif module.written_as(action[s, :1].tolist()):
            assert success[s].unique().numel() <= 2


def test_a_run_is_what_it_was_and_resumes(tiny_student, tiny_teacher, tmp_path):
    runs = {}
    for name, callbacks in (("plain", []), ("watched", [Alignment(every=1, states=4, visits=2)])):
        module = made(tiny_student, tiny_teacher, rollout=Rollout(batch_size=8, horizon=4))
        trainer = fit(module, tmp_path / name, steps=2, callbacks=callbacks)
        runs[name] = [p.detach().clone() for p in module.student.parameters()], {*trainer.callback_metrics}
    for one, other in zip(runs["plain"][0], runs["watched"][0], strict=True):
        assert torch.equal(one, other)
    assert {f"train/teacher/{name}" for name in ("align_states", "align_advantage")} <= runs["watched"][1]
    assert Alignment(every=3).state_dict() == {"seen": 0}


def test_what_it_cannot_do_is_said(tiny_student, tiny_teacher):
    with pytest.raises(ValueError, match=r"Alignment: every=0, states=8 .* must be >= 1"):
        Alignment(every=0)
    with pytest.raises(ValueError, match=r"set model\.reward"):
        Alignment().check(make_module(tiny_student, tiny_teacher))
    module = toy.make_module(objective=Objective([Term(ReverseKL())]), reward=LongerIsBetter())
    with pytest.raises(ValueError, match="goes on from states, which this setting cannot"):
        Alignment().check(module)
