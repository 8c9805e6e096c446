"""The toy setting is a setting: it replays what it sampled, learns, and resumes."""

from __future__ import annotations

import torch

from opd_lightning.teacher import EMA, Teacher
from tests.callbacks import toy
from tests.tiny import act


def test_replayed_steps_have_the_log_probs_with_which_they_were_sampled():
    module = toy.make_module()
    module.configure_model()
    rolled = act(module, toy.make_rows(9), horizon=20)
    said = module.distribution(module.policies["student"], rolled).at(torch.arange(rolled.mask.numel()))
    again = said.log_prob(rolled.actions.flatten(0, 1)).view(rolled.mask.shape)
    assert torch.allclose(again, rolled.behavior_log_probs)
    alone = act(module, toy.make_rows(9)[:1], horizon=20)
    assert torch.allclose(alone.actions[0], rolled.actions[0], atol=1e-6)


def test_the_student_learns_from_another_and_from_itself_seeing_more(tmp_path):
    teachers = {"teacher": Teacher(EMA(0.1), view=toy.Told())}
    first = toy.fit(toy.make_module(), tmp_path / "a", steps=1).callback_metrics["train/loss/ReverseKL"]
    last = toy.fit(toy.make_module(), tmp_path / "b", steps=150).callback_metrics["train/loss/ReverseKL"]
    assert last < first / 4
    apart = toy.fit(toy.make_module(teachers), tmp_path / "c", steps=1).callback_metrics["train/loss/ReverseKL"]
    assert apart > 0


def test_resumes(tmp_path):
    toy.assert_resumes(lambda: (toy.make_module(), []), tmp_path)
