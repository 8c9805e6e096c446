"""What is kept: KL, perplexity and accuracy on prompts of another kind, against dense distributions in float64."""

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
from opd_lightning.retention import BEFORE
from opd_lightning.reward import ExactMatch
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
    p, kl = student_and_kl(module, given, callback.reference)
    surprise = -p.gather(-1, given.actions[..., None]).squeeze(-1)[given.mask].mean()
    return float(kl), math.exp(float(surprise))


def student_and_kl(module, trajectories, reference: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the student, and the mean of KL(reference‖student), over the whole vocabulary."""
    p = tiny.log_softmax(module, "student", trajectories).double()
    q = tiny.log_softmax(module, reference, trajectories).double()
    return p, (q.exp() * (q - p)).sum(-1)[trajectories.mask].mean()


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
    [({"prompt": "1+1="}, "completion is missing, which other rows have"), ({"completion": "2"}, "prompt is missing")],
)
def test_rows_that_can_not_be_measured_are_named(make_world, tmp_path, row, problem):
    path = tmp_path / "texts.jsonl"
    rows = [row, {"prompt": "1+1=", "completion": "2"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
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


@pytest.mark.parametrize("lora", [None, Lora(r=4, alpha=8)], ids=["whole", "lora"])
def test_one_key_compares_with_the_student_before_training(make_world, texts, tmp_path, lora):
    world = make_world("text")
    evaluation = Evaluation(retention=str(texts))
    module = world.module(lora=lora, evaluation=evaluation, optimizer=tiny.sgd(0.5))
    world.fit(module, tmp_path, steps=3, validation=world.make_rows(4), logger=CSVLogger(tmp_path, version=0))
    kl, perplexity = (logged(tmp_path, f"val/retention/{name}") for name in ("kl", "perplexity"))
    (callback,) = (one for one in module.trainer.callbacks if isinstance(one, Retention))
    assert callback.reference == BEFORE
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert (kl[max(kl)], perplexity[max(kl)]) == pytest.approx(dense(module, callback), rel=1e-4)
    assert kl[max(kl)] > 1e-4


def test_without_completions_the_student_writes_and_is_scored(make_world, tmp_path):
    path, world = tmp_path / "others.jsonl", make_world("text")
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in world.make_rows(40)[31:]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    evaluation = Evaluation(retention=str(path))
    module = world.module(evaluation=evaluation, reward=tiny.LongerIsBetter(4), optimizer=tiny.sgd(0.5))
    world.fit(module, tmp_path, steps=3, validation=world.make_rows(4), logger=CSVLogger(tmp_path, version=0))
    kl, accuracy = (logged(tmp_path, f"val/retention/{name}") for name in ("kl", "accuracy"))
    acted = module.evaluator.act("student", rows, 0)
    _, divergence = student_and_kl(module, acted, BEFORE)
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[max(kl)] == pytest.approx(float(divergence), rel=1e-4)
    lengths = [len(text) >= 4 for text in module.completions(acted)]
    assert accuracy[max(kl)] == pytest.approx(sum(lengths) / len(lengths))
    assert accuracy.keys() == kl.keys()


def test_prompts_alone_are_not_scored(make_world, tmp_path):
    path, world = tmp_path / "others.jsonl", make_world("text")
    path.write_text('{"prompt": "1+1="}\n{"prompt": "2+1="}\n', encoding="utf-8")
    module = world.module(evaluation=Evaluation(retention=str(path)), reward=ExactMatch())
    validated, logger = world.make_rows(4), CSVLogger(tmp_path, version=0)
    world.fit(module, tmp_path, steps=1, validation=validated, logger=logger)
    assert logged(tmp_path, "val/retention/kl")
    assert not logged(tmp_path, "val/retention/accuracy")
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+1="}\n', encoding="utf-8")
    module = world.module(evaluation=Evaluation(retention=str(path)), reward=ExactMatch())
    with pytest.raises(
        ValueError, match=r"model.evaluation.retention: row 2 has no 'answer', which model.reward reads"
    ):
        world.fit(module, tmp_path, steps=1)


@pytest.mark.parametrize("completions", [True, False])
def test_the_key_changes_no_training(make_world, tmp_path, completions):
    path, world, weights = tmp_path / "others.jsonl", make_world("text"), []
    rows = [{"prompt": row["prompt"]} | ({"completion": "1"} if completions else {}) for row in world.make_rows(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for retention in (None, str(path)):
        torch.manual_seed(0)
        module = world.module(lora=Lora(r=4, alpha=8, dropout=0.5), evaluation=Evaluation(retention=retention))
        world.fit(module, tmp_path / str(len(weights)), steps=4, validation=world.make_rows(4), val_check_interval=1)
        trained = [weight.detach().flatten() for weight in module.student.parameters() if weight.requires_grad]
        weights.append(torch.cat([*trained, torch.rand(3)]))
    assert torch.equal(*weights)


def test_an_initial_teacher_is_shared(make_world, texts):
    world = make_world("text")
    teachers = {"teacher": Teacher(Initial(), PRIVILEGED)}
    module = world.module(teachers, evaluation=Evaluation(retention=str(texts)))
    assert module.policies[BEFORE].model is module.policies["teacher"].model
    assert set(teachers) == {"teacher"}, "what was handed over stays as it was"


def test_both_ways_in_at_once_are_refused(make_world, texts, tmp_path):
    world = make_world("text")
    module = world.module(evaluation=Evaluation(retention=str(texts)))
    with pytest.raises(ValueError, match="remove one of them"):
        world.fit(module, tmp_path, callbacks=[Retention(str(texts))])
    with pytest.raises(ValueError, match=f"{BEFORE!r} is what evaluation.retention compares with"):
        world.module({BEFORE: Teacher(Initial())}, evaluation=Evaluation(retention=str(texts)))
    with pytest.raises(ValueError, match=r"evaluation\.retention needs a vocabulary"):
        toy.make_module(evaluation=Evaluation(retention=str(texts)))


def test_a_row_that_the_student_cannot_read_is_named_at_the_start(make_world, tmp_path):
    path, world = tmp_path / "others.jsonl", make_world("text")
    path.write_text('{"prompt": "1+1="}\n{"prompt": "Über"}\n', encoding="utf-8")
    module = world.module(evaluation=Evaluation(retention=str(path)))
    with pytest.raises(ValueError, match=r"model.evaluation.retention: .*others.jsonl, row 2: "):
        world.fit(module, tmp_path, steps=1)
