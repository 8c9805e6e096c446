"""Callbacks that let policies act besides the rollouts, in the toy setting."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.methods.rollouts import (
    ANOTHER,
    HINTED,
    JUDGED,
    BestOfTeacher,
    InsertSuccess,
    PassRates,
    Rewrite,
    acted,
)
from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.objective import ForwardKL, GroupRelative, Objective, PolicyGradient, ReverseKL, Term
from opd_lightning.pretrained import Pretrained
from opd_lightning.reward import CallableReward
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Frozen, Same, Teacher
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


def ends_high(completion, example):
    """Right for about a third of random texts."""
    return float(completion[-1:] in ("7", "8", "9", "+"))


def selecting(student, teacher, folder, callback, steps=1):
    """Two rollouts of the student's and one of the teacher's for each of ten prompts; what is trained, and a twin."""
    teachers = {"teacher": Teacher(Frozen(Pretrained(str(teacher))))}
    if callback is not None and callback.hinted:
        teachers["hinted"] = Teacher(Same("teacher"), PromptView("{{ answer }}?{{ prompt }}"))
    terms = [Term(ReverseKL(), source="student"), Term(ForwardKL(), source="teacher", coefficient=10.0)]
    rollout = Rollout(batch_size=10, horizon=6, members={"student": 2, "teacher": 1})
    modules = [
        tiny.make_module(
            student, teachers, Objective(terms), rollout=rollout, reward=CallableReward(f"{__name__}.ends_high")
        )
        for _ in range(2)
    ]
    sees = Sees()
    trainer = tiny.fit(modules[0], folder, callbacks=[*([callback] if callback else []), sees], steps=steps)
    tiny.attach(modules[1], folder)
    return modules, sees.batches[0], trainer


def likely_by_loops(module, own, candidate, group):
    """Mean over the student's rollouts of a prompt of the share of tokens that are among its 3 likeliest there."""
    shares = []
    for row in (own.group == group).nonzero().flatten().tolist():
        states = module.distribution(module.policies["student"], own.select(torch.tensor([row])))
        inside = []
        for t in range(int(candidate.mask.sum())):
            if t >= int(own.mask[row].sum()):
                inside.append(False)
                continue
            state = states.at(torch.tensor([t]))
            logits = state.head(state.hidden).double()[0]
            inside.append(int(candidate.actions[0, t]) in logits.argsort(descending=True)[:3].tolist())
        shares.append(sum(inside) / len(inside))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("hinted", [None, "hinted"])
def test_the_teachers_best_is_a_right_one_and_like_the_students(hinted, tiny_student, tiny_teacher, tmp_path):
    """Everything is done again by hand: candidates from the same seeds, rewards, likeness, and who is taken."""
    (_, again), plain, _ = selecting(tiny_student, tiny_teacher, tmp_path / "plain", None)
    callback = BestOfTeacher(count=2, hinted=hinted, likeliest=3)
    (_, again), batch, trainer = selecting(tiny_student, tiny_teacher, tmp_path / "best", callback)
    places = (plain.source == plain.sources.index("teacher")).nonzero().flatten()
    assert len(places) == 10
    own = plain.select((plain.source == plain.sources.index("student")).nonzero().flatten())
    first = plain.select(places)
    candidates = [first, *(acted(again, "teacher", plain, places, ANOTHER + draw) for draw in range(1))]
    helped = None if hinted is None else acted(again, "hinted", plain, places, HINTED)
    tiers = []
    for i, place in enumerate(places.tolist()):
        rows = [candidate.select(torch.tensor([i])) for candidate in candidates]
        right = [ends_high(again.completions(row)[0], {}) for row in rows]
        alike = [likely_by_loops(again, own, row, plain.group[place]) for row in rows]
        best = max(range(2), key=lambda k: (right[k], alike[k], -k))
        chosen, tier = rows[best], "right" if right[best] else "none_right"
        if helped is not None and not right[best]:
            hint = helped.select(torch.tensor([i]))
            if ends_high(again.completions(hint)[0], {}):
                chosen, tier = hint, "hinted"
        tiers.append(tier)
        count = int(chosen.mask.sum())
        assert batch.length[place] == count
        assert torch.equal(batch.actions[place, :count], chosen.actions[0, :count])
        assert batch.sources[batch.source[place]] == "teacher"
    assert {"right", "none_right"} <= set(tiers)
    assert ("hinted" in tiers) == (hinted is not None)
    for name in ("right", "hinted", "none_right"):
        share = float(trainer.callback_metrics[f"train/best_of_teacher/{name}"])
        assert share == pytest.approx(tiers.count(name) / 10)
    others = [i for i in range(len(plain)) if i not in places.tolist()]
    assert torch.equal(batch.actions[others][:, :1], plain.actions[others][:, :1]), "the student's own stay"


def test_the_best_of_one_without_a_hint_changes_nothing(tiny_student, tiny_teacher, tmp_path):
    (plain, _), *_ = selecting(tiny_student, tiny_teacher, tmp_path / "plain", None, 2)
    (one, _), *_ = selecting(tiny_student, tiny_teacher, tmp_path / "one", BestOfTeacher(count=1), 2)
    for a, b in zip(plain.student.parameters(), one.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_teacher_without_a_place_in_the_group_is_refused(tiny_student, tiny_teacher, tmp_path):
    module = tiny.make_module(tiny_student, tiny_teacher, reward=LongerIsBetter())
    with pytest.raises(ValueError, match=r"rollout\.members has to name student and teacher, .*it is None"):
        tiny.fit(module, tmp_path, callbacks=[BestOfTeacher()])
    with pytest.raises(ValueError, match=r"set model\.reward"):
        toy.fit(toy.make_module(), tmp_path, [BestOfTeacher()], 1)
    with pytest.raises(ValueError, match="count=0"):
        BestOfTeacher(count=0)
