"""Code that people edit between two runs is found out; layout, comments and installed packages are not looked at."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from opd_lightning.own_code import edited, fingerprints
from tests.processes import finish, last, start
from tests.test_resume import PLAIN, configuration

CODE = '''
import functools


def judge(completion, row):
    """Says whether it is short."""
    return float(len(completion) < 3)


class Judge:
    def __call__(self, completion, row):
        return 1.0


halved = functools.partial(judge, row=None)
instance = Judge()
'''
CONFIG = """
model:
  reward: {class_path: CallableReward, init_args: {function: edited_by_hand.judge}}
  evaluation: {metrics: {best: edited_by_hand.Judge, most: os.path.join, none: nowhere.at_all, own: tests.tiny.fit,
    half: edited_by_hand.halved, one: edited_by_hand.instance}}
  environment: {class_path: edited_by_hand.Judge, init_args: {text: a. b, path: opd_lightning.fetch.fetch}}
"""
KEYS = {
    "model.reward.init_args.function",
    "model.evaluation.metrics.best",
    "model.evaluation.metrics.half",
    "model.evaluation.metrics.one",
    "model.environment",
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "edited_by_hand.py"
    sys.modules.pop("edited_by_hand", None)


def marks(file: Path, code: str) -> dict[str, str]:
    file.write_text(code, encoding="utf-8")
    sys.modules.pop("edited_by_hand", None)
    importlib.invalidate_caches()
    importlib.import_module("edited_by_hand")
    return fingerprints(CONFIG)


def test_what_is_edited_is_told_by_its_key(file):
    before = marks(file, CODE)
    assert before.keys() == KEYS | {"model.evaluation.metrics.own"}
    layout = CODE.replace("Says whether it is short.", "Tells.").replace("    return 1.0", "    return 1.0  # always")
    assert edited(before, marks(file, layout)) == []
    changed = edited(before, marks(file, CODE.replace("< 3", "< 4")))
    assert [key for key, *_ in changed] == ["model.reward.function", "model.evaluation.metrics.half"]
    assert all(old != new for _, old, new in changed)
    assert {key for key, *_ in edited(before, marks(file, CODE.replace("1.0", "0.0")))} == {
        "model.evaluation.metrics.best",
        "model.evaluation.metrics.one",
        "model.environment",
    }


def test_a_run_whose_reward_was_edited_does_not_go_on_unless_it_may(file, make_world, tmp_path):
    file.write_text(CODE, encoding="utf-8")
    reward = {"model": {"reward": {"class_path": "CallableReward", "init_args": {"function": "edited_by_hand.judge"}}}}
    config = configuration(tmp_path / "run", make_world("text"), {**PLAIN, **reward})
    own = ["--trainer.max_steps=2", "--model.schedule.name=constant"]
    finish(start(config, *own))
    file.write_text(CODE.replace("< 3", "< 4"), encoding="utf-8")
    own = ["--ckpt_path=last", "--trainer.max_steps=3", "--model.schedule.name=constant"]
    run = start(config, *own)
    assert run.end() == 1
    assert "model.reward.function: code " in run.output
    assert "--checkpoint.may_change='[model.reward.function]'" in run.output
    run = start(config, *own, "--checkpoint.may_change=[model.reward]")
    finish(run)
    assert "Changed after optimizer step 2: model.reward.function code " in run.output
    assert "may_change" not in run.output
    assert last(config)["global_step"] == 3
