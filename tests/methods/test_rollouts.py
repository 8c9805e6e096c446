"""Callbacks that let policies act besides the rollouts, in the toy setting."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.methods.rollouts import JUDGED, InsertSuccess, PassRates, Rewrite, acted
from opd_lightning.objective import GroupRelative, Objective, PolicyGradient, ReverseKL, Term
from opd_lightning.rollout_settings import Rollout
from tests import tiny
from tests.callbacks import toy
from tests.tiny import LongerIsBetter


class Sees(toy.L.Callback):
    """The batches that are trained."""

    def __init__(self) -> None:
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch.trajectories.to("cpu"))


class Judged(toy.Moves):
    """A rollout is right if its first step is nearer to where the teacher's model goes than to the student's start."""

    def rewards(self, trajectories):
        _, shown = super().rewards(trajectories)
        start = trajectories.observation["start"]
        goals = [toy.Mover(seed)(start, torch.zeros_like(start)).detach() for seed in (0, 1)]
        away = [(trajectories.actions[:, 0] - goal).norm(dim=1) for goal in goals]
        return (away[1] < away[0]).float(), shown


def make():
    terms = [Term(PolicyGradient(GroupRelative()), None), Term(ReverseKL(), coefficient=0.1)]
    rollout = Rollout(batch_size=3, horizon=6, group_size=2)
    return toy.make_module(objective=Objective(terms), setting=Judged, reward=LongerIsBetter(), rollout=rollout)


def test_a_group_without_success_gets_a_right_rollout_of_the_better_policy(tmp_path):
    module, sees = make(), Sees()
    toy.fit(module, tmp_path, [InsertSuccess(gate=0.0), sees], 6)
    inserted = [batch for batch in sees.batches if len(batch.sources) > 1]
    assert inserted, "the student fails on whole groups at first"
    for batch in inserted:
        guest = batch.source == batch.sources.index("teacher")
        assert (batch.reward[guest] == 1).all(), "only right ones are put in"
        assert batch.behavior_log_probs[guest][batch.mask[guest]].isnan().all(), "with an importance ratio of 1"
        assert all(int(guest[batch.group == group].sum()) <= 1 for group in batch.group.unique())
        for group in batch.group[guest].unique():
            rewards = batch.reward[batch.group == group]
            assert torch.equal(batch.group_mean[batch.group == group], rewards.mean().expand(len(rewards)))


def test_a_gate_that_no_group_passes_changes_nothing(tmp_path):
    plain, gated = make(), make()
    toy.fit(plain, tmp_path / "plain", [], 4)
    toy.fit(gated, tmp_path / "gated", [InsertSuccess(gate=-1.0)], 4)
    for one, other in zip(plain.student.parameters(), gated.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_with_insertions_resumes(tmp_path):
    toy.assert_resumes(lambda: (make(), [InsertSuccess()]), tmp_path, steps=3)


def test_without_groups_or_rewards_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"InsertSuccess looks at the rewards of groups"):
        toy.fit(toy.make_module(), tmp_path, [InsertSuccess()], 1)


def rewriting(student, teacher, folder, callbacks=(), **rollout):
    module = tiny.make_module(student, teacher, rollout=Rollout(batch_size=4, horizon=6, **rollout))
    sees = Sees()
    tiny.fit(module, folder, callbacks=[*callbacks, sees], steps=2)
    return module, sees.batches


def test_the_student_is_trained_on_what_the_teacher_wrote_as_if_it_had_been_asked_the_prompt(
    tiny_student, tiny_teacher, tmp_path
):
    rewrite = Rewrite("{draft}?{prompt}")
    asked = []
    rewrite.asked = lambda prompt, draft: asked.append((prompt, draft)) or Rewrite.asked(rewrite, prompt, draft)
    _, plain = rewriting(tiny_student, tiny_teacher, tmp_path / "plain")
    _, batches = rewriting(tiny_student, tiny_teacher, tmp_path / "new", [rewrite])
    for name, value in plain[0].observation.items():
        assert torch.equal(value, batches[0].observation[name]), "the student's prompt"
    assert {batch.sources[i] for batch in batches for i in batch.source} == {"teacher"}
    assert not torch.equal(plain[0].actions, batches[0].actions)
    assert [prompt for prompt, _ in asked[:4]] == [example["prompt"] for example in plain[0].examples]
    assert any(draft for _, draft in asked)


def test_a_rewrite_that_changes_nothing_is_plain_distillation(tiny_student, tiny_teacher, tmp_path):
    """The student writes the same again: greedily, from the same prompt."""
    same = Rewrite("{prompt}{draft}", by="student")
    same.prompt = "{prompt}"
    plain, _ = rewriting(tiny_student, tiny_teacher, tmp_path / "plain", temperature=0)
    again, _ = rewriting(tiny_student, tiny_teacher, tmp_path / "again", [same], temperature=0)
    for one, other in zip(plain.student.parameters(), again.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_whoever_rewrites_is_asked_in_the_last_message():
    rewrite = Rewrite("Shorter: {draft} ({prompt})")
    assert rewrite.asked("1+1=", "2") == "Shorter: 2 (1+1=)"
    chat = [{"role": "system", "content": "Be {brief}."}, {"role": "user", "content": "1+1="}]
    assert rewrite.asked(chat, "2") == [chat[0], {"role": "user", "content": "Shorter: 2 (1+1=)"}]
    with pytest.raises(ValueError, match=r"name \{draft\} in it"):
        Rewrite("Shorter, please.")
    with pytest.raises(ValueError, match="the last message of a chat has parts that are none"):
        rewrite.asked([{"role": "user", "content": [{"type": "image"}]}], "2")


def test_prompts_weigh_what_rollouts_of_their_own_say(tmp_path):
    """Again with the same seeds: the rate is the mean over them, one for both members of a group."""
    module, sees, rates = make(), Sees(), PassRates(rollouts=3, easy=1.0, hard=2.0)
    toy.fit(module, tmp_path, [rates, sees], 1)
    (batch,) = sees.batches
    again = make()
    toy.fit(again, tmp_path / "start", [], 0)
    first = torch.arange(0, len(batch), 2)
    rewards = [
        again.actor.checked_rewards(acted(again, "student", batch, first, JUDGED + draw))[0] for draw in range(3)
    ]
    rate = torch.stack(rewards).mean(0)
    torch.testing.assert_close(batch.weight, (rate * (1 - rate) ** 2).repeat_interleave(2))
    assert (batch.weight[batch.weight > 0] <= 4 / 27 + 1e-6).all(), "largest at a / (a + b)"


def test_a_run_with_pass_rates_resumes_and_refuses_impossible_numbers(tmp_path):
    toy.assert_resumes(lambda: (make(), [PassRates(rollouts=2)]), tmp_path, steps=3)
    with pytest.raises(ValueError, match=r"PassRates counts what is right: set model\.reward"):
        toy.fit(toy.make_module(), tmp_path / "no", [PassRates()], 1)
    with pytest.raises(ValueError, match="rollouts=0 must be >= 1"):
        PassRates(rollouts=0)
