"""Alarms: each sign of a collapse is told once, with advice; a run that is well hears nothing."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import lightning as L
import pytest
import torch

from opd_lightning.callbacks import CollapseAlarm, Curriculum, EarlyStopRollout, FirstSteps, Linear, Piecewise
from opd_lightning.callbacks.collapse_alarm import compressibility
from opd_lightning.objective import CrossEntropy, Objective, ReverseKL, Term
from opd_lightning.rollout_settings import Rollout
from tests.callbacks import toy

HEALTHY = {
    "student_entropy": 2.0,
    "length": 100.0,
    "stopped": 0.9,
    "repetition": 0.0,
    "teacher/kl_first_step": 0.5,
    "teacher/overlap_mass": 0.97,
    "loss/ReverseKL": 0.3,
    "teacher/entropy": 1.5,
}


class Plays(toy.Moves):
    """Records what a story says instead of what happens."""

    story: dict[int, dict[str, float]] = {}  # noqa: RUF012  (each test has its own)

    def recorded(self) -> dict[str, float]:
        return {**HEALTHY, **self.story.get(self.global_step, {})}


def play(folder, alarm: CollapseAlarm, story: dict[int, dict[str, float]], steps: int = 8) -> tuple[list[str], Any]:
    """What the alarm says to that story."""

    class Story(Plays):
        pass

    Story.story = story
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trainer = toy.fit(toy.make_module(setting=Story), folder, [alarm], steps=steps)
    return [str(w.message) for w in heard if str(w.message).startswith("optimizer step")], trainer


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        ({"student_entropy": 0.2}, r"train/student_entropy is 0.2, against 1.5: .*mix in others"),
        ({"length": 250.0}, r"train/length is 250, against 100: .*StableOPD"),
        ({"stopped": 0.3}, "train/stopped is 0.3, against 0.9: .*stop token"),
        ({"repetition": 0.4}, r"train/repetition is 0.4.*completions of the dataset"),
        ({"teacher/kl_first_step": 9.0}, "train/teacher/kl_first_step is 9.*templates"),
        ({"teacher/overlap_mass": 0.4}, "train/teacher/overlap_mass is 0.4.*same steps"),
    ],
)
def test_what_lasts_is_told_once_with_advice(wrong, advice, tmp_path):
    heard, _ = play(tmp_path, CollapseAlarm(), dict.fromkeys(range(4, 9), wrong))
    (message,) = heard
    assert message.startswith("optimizer step 6:")
    assert re.search(advice, message)
    (kept,) = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text(encoding="utf-8").splitlines()]
    assert f"optimizer step {kept['step']}: {kept['message']}" == message, "what the report shows is what was said"
    off = CollapseAlarm(entropy=None, length=None, truncated=None, repetition=None, first_step_kl=None, overlap=None)
    assert not play(tmp_path / "off", off, dict.fromkeys(range(4, 9), wrong))[0]


def test_a_student_that_becomes_as_sure_as_its_teacher_is_well(tmp_path):
    sure = {"student_entropy": 0.1, "teacher/entropy": 0.1}
    assert not play(tmp_path, CollapseAlarm(), dict.fromkeys(range(4, 9), sure))[0]


def test_a_dip_is_not_told_and_a_relapse_is_told_again(tmp_path):
    low = {"student_entropy": 0.1}
    assert not play(tmp_path / "dip", CollapseAlarm(), {4: low, 5: low, 7: low, 8: low})[0]
    heard, _ = play(tmp_path / "again", CollapseAlarm(patience=1), {4: low, 5: low, 7: low, 8: low})
    assert [message.split(":")[0] for message in heard] == ["optimizer step 4", "optimizer step 7"]
    lines = (tmp_path / "again" / "alarms.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 7]
    assert not (tmp_path / "dip" / "alarms.jsonl").exists()


def test_a_loss_that_is_not_finite_is_told_at_once(tmp_path):
    heard, _ = play(tmp_path, CollapseAlarm(), {2: {"loss/ReverseKL": float("nan")}})
    assert heard == [
        "optimizer step 2: loss/ReverseKL is nan: lower the learning rate, clip gradients, or train in float32"
    ]


def test_stop_ends_the_run_with_a_checkpoint_that_can_go_on(tmp_path):
    low = {step: {"student_entropy": 0.1} for step in range(4, 9)}
    alarm = CollapseAlarm("stop")
    _, trainer = play(tmp_path, alarm, low)
    assert trainer.global_step == 6
    again = toy.fit(
        toy.make_module(), tmp_path / "on", [CollapseAlarm()], steps=8, checkpoint=tmp_path / "collapse.ckpt"
    )
    assert again.global_step == 8


def test_repetition_is_found_whatever_the_steps_are():
    draws = torch.Generator().manual_seed(0)
    assert compressibility(torch.zeros(2000, dtype=torch.long)) > 10
    assert compressibility(torch.arange(2000) % 7) > 10
    assert compressibility(torch.tensor([[0.1, 2.0], [0.3, -1.0]]).repeat(500, 1)) > 10
    assert compressibility(torch.randint(0, 50_000, (2000,), generator=draws)) < 3
    assert compressibility(torch.randn(2000, 3, generator=draws)) < 3
    assert compressibility(torch.zeros(0)) == 1


def test_a_student_that_learns_to_say_one_thing_is_noticed(make_world, tmp_path):
    """Trained on one letter over and over: entropy and overlap go, repetition comes."""
    world = make_world("text")
    rows = [{**row, "completion": "1" * 60} for row in world.make_rows(24)]
    sources = Piecewise({0: {"student": 1.0}, 3: {"dataset": 1.0}, 25: {"student": 1.0}})
    module = world.module(
        objective=Objective([Term(CrossEntropy(), teacher=None), Term(ReverseKL(), coefficient=1e-3)]),
        rollout=Rollout(batch_size=8, horizon=120),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    )
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        alarm = CollapseAlarm(compression=4)
        others = [Curriculum({"rollout.behavior": sources}), EarlyStopRollout(FirstSteps(100))]
        trainer = world.fit(module, tmp_path, rows, steps=30, callbacks=[alarm, *others])
    said = " ".join(str(w.message) for w in heard)
    for sign in ("train/student_entropy", "train/repetition"):
        assert sign in said
    assert trainer.callback_metrics["train/alarms"] >= 1


def test_it_composes_and_resumes(tmp_path):
    class Watches(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            assert "repetition" in pl_module.recorded()

    def make():
        module = toy.make_module(rollout=Rollout(batch_size=8, micro_batch_size=4, horizon=6))
        grows = Curriculum({"rollout.horizon": Linear(2, 9, 4)})
        return module, [CollapseAlarm(length=1.2, patience=2), Watches(), grows]

    toy.assert_resumes(make, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "panic"}, r"action is warn or stop, not 'panic'"),
        ({"patience": 0}, r"patience=0 and baseline=3 must be >= 1"),
        ({"compression": 1.0}, r"compression=1\.0 > 1"),
    ],
)
def test_values_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CollapseAlarm(**settings)
