"""The examples of the documentation do what the pages say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.callbacks import Curriculum, Linear
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout import Rollout
from opd_lightning.scoring import Scoring
from opd_lightning.teacher import Frozen, Teacher
from tests.callbacks import toy
from tests.tiny import LongerIsBetter, act, fit, make_module, sgd, teacher_forced
from tests.tiny_vlm import vlm_rows

DOCS = Path(__file__).parent.parent / "docs"


def example(page: str) -> tuple[str, dict[str, Any]]:
    """The page's Python block, and what running it defines."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    defined: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, page, "exec"), defined)
    assert len(code.splitlines()) < 60
    return code, defined


def test_add_a_view():
    _, defined = example("add_a_view.md")
    view, row = defined["Stripe"](brightness=0.0), vlm_rows(1)[0]
    before = row["images"][0].tobytes()
    (shown,) = view(row)["images"]
    assert row["images"][0].tobytes() == before
    assert shown.getpixel((5, 2)) == (0, 0, 0)
    assert shown.getpixel((5, 10)) == row["images"][0].getpixel((5, 10))
    assert view({**row, "box": None}) is None


def test_rewards():
    _, defined = example("rewards.md")
    answers = [("it is 4", "4"), ("it is 5", "4"), ("", "4"), ("5", "")]
    scored = [Scoring()(defined["judge"], completion, {"answer": answer}) for completion, answer in answers]
    assert scored == [1, 0, 0, None]


def test_add_a_setting(tmp_path):
    _, defined = example("add_a_setting.md")
    module = make_module(
        Pretrained("0"),
        {"teacher": Teacher(Frozen(Pretrained("1")))},
        setting=defined["Walks"],
        rollout=Rollout(batch_size=32, horizon=8),
        optimizer=sgd(1.0),
    )
    rows = [{"prompt": str(i % 9 - 4)} for i in range(64)]
    rolled = act(module, rows)
    assert torch.allclose(teacher_forced(module, "student", rolled), rolled.behavior_log_probs, atol=1e-5)
    trainer = fit(module, tmp_path, rows)
    first = float(trainer.callback_metrics["train/loss/ReverseKL"])
    trainer = fit(module, tmp_path, rows, steps=60)
    assert float(trainer.callback_metrics["train/loss/ReverseKL"]) < first / 4


def test_add_a_callback(tmp_path):
    _, defined = example("add_a_callback.md")

    def make(spread: float = 10.0) -> Any:
        rollout = Rollout(batch_size=4, group_size=2, micro_batch_size=4, horizon=6)
        return toy.make_module(rollout=rollout, reward=LongerIsBetter()), [defined["Warmer"](spread)]

    module, callbacks = make()
    trainer = toy.fit(module, tmp_path / "same", callbacks, steps=3)
    assert module.rollout.temperature == 1.3
    assert trainer.callback_metrics["knob/rollout.temperature"] == 1.2
    module, callbacks = make(spread=-1.0)
    toy.fit(module, tmp_path / "spread", callbacks, steps=3)
    assert module.rollout.temperature == 1
    twice = [*callbacks, Curriculum({"rollout.temperature": Linear(1, 2, 3)})]
    with pytest.raises(ValueError, match=r"Warmer .* and Curriculum .* turn the same knob"):
        toy.fit(module, tmp_path / "twice", twice)
    toy.assert_resumes(make, tmp_path)
