"""What is kept: KL to the reference and perplexity on given texts, against dense distributions in float64."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from opd_lightning.callbacks import Retention
from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.pretrained import Lora
from opd_lightning.teacher import Initial, Teacher
from tests import tiny
from tests.callbacks import toy
from tests.worlds import PRIVILEGED


@pytest.fixture
def texts(tmp_path, make_world):
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in make_world("text").make_rows(40)[30:]]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def logged(folder: Path, name: str) -> dict[int, float]:
    (table,) = folder.rglob("metrics.csv")
    with table.open(encoding="utf-8") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def dense(module, callback: Retention) -> tuple[float, float]:
    """KL(reference‖student) and perplexity; the reference reads the prompts that the student reads."""
    rollout = dataclasses.replace(module.rollout, horizon=callback.horizon)
    given = module.act("dataset", callback.rows, [0] * len(callback.rows), rollout)
    p = tiny.log_softmax(module, "student", given).double()
    q = tiny.log_softmax(module, "teacher", given).double()
    kl = (q.exp() * (q - p)).sum(-1)[given.mask].mean()
    surprise = -p.gather(-1, given.actions[..., None]).squeeze(-1)[given.mask].mean()
    return float(kl), math.exp(float(surprise))


def test_both_are_those_of_dense_distributions_before_and_after(make_world, texts, tmp_path):
    world = make_world("text")
    teachers = {"teacher": Teacher(Initial(), PRIVILEGED)}
    module = world.module(teachers, lora=Lora(r=4, alpha=8), evaluation=Evaluation(), optimizer=tiny.sgd(0.5))
    callback = Retention(str(texts), horizon=5)
    validated = world.make_rows(4)
    world.fit(
        module, tmp_path, steps=3, callbacks=[callback], validation=validated, logger=CSVLogger(tmp_path, version=0)
    )
    kl, perplexity = (logged(tmp_path, f"val/retention/{name}") for name in ("kl", "perplexity"))
    assert kl[0] == pytest.approx(0, abs=1e-6)
    after = dense(module, callback)
    last = max(kl)
    assert (kl[last], perplexity[last]) == pytest.approx(after, rel=1e-4)
    assert kl[last] > 1e-4
    assert perplexity[0] != pytest.approx(perplexity[last], rel=1e-4)


def test_looking_changes_no_training(make_world, texts, tmp_path):
    world, weights = make_world("text"), []
    for name, callbacks in (("plain", []), ("watched", [Retention(str(texts))])):
        module = world.module()
        world.fit(module, tmp_path / name, steps=2, callbacks=callbacks)
        weights.append(torch.cat([weight.detach().flatten() for weight in module.student.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("row", "problem"),
    [({"prompt": "1+1="}, "completion is missing"), ({"completion": "2"}, "prompt is missing")],
)
def test_rows_that_can_not_be_measured_are_named(make_world, tmp_path, row, problem):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    world = make_world("text")
    with pytest.raises(ValueError, match=rf"Retention.data: .*texts.jsonl, row 1: {problem}"):
        world.fit(world.module(), tmp_path, callbacks=[Retention(str(path))])


def test_what_it_needs_is_refused_when_it_lacks(make_world, texts, tmp_path):
    world = make_world("text")
    with pytest.raises(ValueError, match=r"no 'original' in model\.teachers"):
        world.fit(world.module(), tmp_path, callbacks=[Retention(str(texts), reference="original")])
    with pytest.raises(ValueError, match="needs a vocabulary"):
        toy.fit(toy.make_module(), tmp_path, [Retention(str(texts))])
    with pytest.raises(ValueError, match=r"horizon must be >= 1"):
        Retention(str(texts), horizon=0)
