"""Validation: the student acts on held-out prompts and is scored."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from opd_lightning.evaluation import pass_at_k
from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Frozen, Teacher
from tests.callbacks import toy
from tests.tiny import LongerIsBetter, Rows, act, log_softmax, make_trainer, teacher_forced


@pytest.fixture
def held_out(world):
    """Batches of 4 and 2."""
    return world.make_rows(30)[24:]


class IsEven:
    """Right for the prompts with an even number but the first, whatever was written."""

    columns = ("task", "prompt")

    def __call__(self, completion: str, example: dict) -> float:
        return float(example["task"] == "even" and "24" not in example["prompt"])


class Abstains:
    columns = ()

    def __call__(self, completion: str, example: dict) -> None:
        return None


def validate(module, folder, rows, **settings) -> dict[str, float]:
    trainer = make_trainer(folder, **settings)
    return trainer.validate(module, datamodule=Rows([], rows), verbose=False)[0]


def test_an_evaluated_checkpoint_is_logged_under_its_own_step(tmp_path):
    """Lightning counts no steps where it only evaluates, and the report takes step 0 for before training."""
    toy.fit(toy.make_module(), tmp_path, steps=2)
    logger = CSVLogger(tmp_path, name="logs")
    again = make_trainer(tmp_path, logger=logger)
    data = Rows([], toy.make_rows(3))
    again.validate(toy.make_module(), datamodule=data, ckpt_path=tmp_path / "step-2.ckpt", verbose=False)
    (row,) = csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text(encoding="utf-8").splitlines())
    assert row["step"] == "2"
    assert json.loads((tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"] == 2


# -- pass@k -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 5])
def test_pass_at_k_counts_the_subsets_that_hold_a_right_one(n):
    outcomes = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))
    for k in range(1, n + 1):
        wanted = [
            sum(any(row[i] for i in chosen) for chosen in itertools.combinations(range(n), k))
            / len(list(itertools.combinations(range(n), k)))
            for row in outcomes.tolist()
        ]
        assert torch.allclose(pass_at_k(outcomes, k), torch.tensor(wanted))


def test_pass_at_k_reads_rewards_against_a_threshold():
    assert pass_at_k(torch.tensor([[0.2, 0.5], [0.4, 0.1]]), 1).tolist() == [0.5, 0.0]


# -- what is reported ---------------------------------------------------------------------------------------------


def test_values_are_those_of_all_held_out_prompts(any_world, tmp_path):
    held_out = any_world.make_rows(30)[24:]
    module = any_world.module(reward=IsEven(), rollout=Rollout(horizon=8, top_k=1, temperature=3.0))
    found = validate(module, tmp_path, held_out)
    rolled = act(module, held_out, temperature=0.0, top_k=None)
    p, q = log_softmax(module, "student", rolled), log_softmax(module, "teacher", rolled)
    kl = (p.exp() * (p - q)).sum(-1)
    other = (q.exp() * (q - p)).sum(-1)
    assert found["val/accuracy"] == pytest.approx(2 / 6)
    assert found["val/length"] == pytest.approx(float(rolled.length.float().mean()))
    assert found["val/stopped"] == pytest.approx(float(rolled.stopped.float().mean()))
    assert found["val/teacher/kl_student_teacher"] == pytest.approx(float(kl[rolled.mask].mean()), rel=1e-4)
    assert found["val/teacher/kl_teacher_student"] == pytest.approx(float(other[rolled.mask].mean()), rel=1e-4)
    assert found["val/teacher/kl_first_step"] == pytest.approx(float(kl[:, 0].mean()), rel=1e-4)
    assert "val/pass@1" not in found


def test_several_samples_per_prompt(world, held_out, tmp_path):
    settings = Evaluation(samples=4, temperature=1.0, horizon=3, before=False)
    module = world.alone(reward=LongerIsBetter(3), evaluation=settings)
    found = validate(module, tmp_path, held_out)
    assert 0 < found["val/accuracy"] < found["val/pass@4"] <= 1
    assert found["val/length"] <= 3
    assert validate(module, tmp_path, held_out) == found, "the same draws at every validation"


def test_without_a_reward_there_is_no_accuracy(world, held_out, tmp_path):
    module = world.alone()
    module.reward = None
    found = validate(module, tmp_path, held_out)
    assert {"val/length", "val/stopped"} <= found.keys()
    assert not any("accuracy" in name or "kl" in name for name in found)


def test_metrics_are_measured_of_the_same_completions_and_change_no_reward(world, held_out, tmp_path):
    metrics = {"even": IsEven(), "no_opinion": Abstains()}
    plain = world.alone(reward=LongerIsBetter(3))
    if "categorical" not in plain.provides:
        with pytest.raises(ValueError, match=r"evaluation\.metrics read completions that are texts"):
            world.alone(evaluation=Evaluation(metrics=metrics))
        return
    module = world.alone(reward=LongerIsBetter(3), evaluation=Evaluation(metrics=metrics))
    assert "model.evaluation.metrics.even" in module.required_columns()["task"]
    found = validate(module, tmp_path, held_out)
    assert found.pop("val/even") == pytest.approx(2 / 6)
    assert "val/no_opinion" not in found
    assert found == validate(plain, tmp_path / "plain", held_out)


def test_test_and_predict(world, held_out, tmp_path):
    module = world.alone(reward=IsEven())
    trainer = make_trainer(tmp_path)
    assert trainer.test(module, datamodule=Rows([], held_out), verbose=False)[0]["test/accuracy"] == pytest.approx(
        2 / 6
    )
    rows = [row for batch in trainer.predict(module, datamodule=Rows([], held_out)) for row in batch]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in held_out]
    assert {"prompt", "completion", "reward"} <= rows[0].keys()


def test_predicted_rows_need_no_answer(world, held_out, tmp_path):
    unanswered = [{name: value for name, value in row.items() if name != "task"} for row in held_out]
    module = world.alone(reward=IsEven())
    rows = [row for batch in make_trainer(tmp_path).predict(module, datamodule=Rows([], unanswered)) for row in batch]
    assert len(rows) == len(held_out)
    assert {row["reward"] for row in rows} == {None}


def test_samples_are_kept(world, held_out, tmp_path):
    module = world.alone(reward=IsEven(), evaluation=Evaluation(show=2, samples=3, temperature=1.0))
    validate(module, tmp_path, held_out)
    validate(module, tmp_path, held_out)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in held_out[:2]] * 2, "one of each prompt's three"
    assert rows[0].keys() >= {"step", "stage", "who", "prompt", "completion", "reward"}
    assert (rows[0]["step"], rows[0]["stage"], rows[0]["who"]) == (0, "val", "student")


def test_samples_hold_what_the_teacher_made_of_each_step(world, held_out, tmp_path):
    module = world.module(reward=IsEven(), evaluation=Evaluation(show=2, horizon=6, before=False))
    rows = [row for row in held_out if row["solution"]]
    validate(module, tmp_path, rows)
    kept = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(kept) == 2
    acted = act(module, rows, temperature=0.0, horizon=6)
    expected = teacher_forced(module, "teacher", acted)
    for i, row in enumerate(kept):
        count = int(acted.mask[i].sum())
        assert row["teacher_log_probs"] == pytest.approx(expected[i][acted.mask[i]].tolist(), abs=1e-3)
        assert len(row["steps"]) == len(row["likeliest"]) == count
        assert "".join(row["steps"]).startswith(row["completion"])
        for step, log_prob, lines in zip(row["steps"], row["teacher_log_probs"], row["likeliest"], strict=True):
            assert len(lines) == 5
            assert lines[0][1] >= log_prob - 1e-4
            if lines[0][0] == step:
                assert lines[0][1] == pytest.approx(log_prob, abs=1e-3)


# -- before training ----------------------------------------------------------------------------------------------


def test_student_and_teachers_are_scored_once_before_training(world, held_out, tmp_path):
    """Not mixed with the trainer's sanity check, which runs first."""
    teachers = {
        "teacher": Teacher(Frozen(Pretrained(str(world.teacher))), world.view),
        "average": Teacher(EMA()),
    }
    objective = Objective([Term(ReverseKL()), Term(ReverseKL(), "average")])
    module = world.module(teachers, objective, reward=IsEven(), evaluation=Evaluation(show=1))
    alone = world.module(teachers, objective, reward=IsEven())
    expected = validate(alone, tmp_path / "alone", held_out)
    logger = CSVLogger(tmp_path)
    world.fit(module, tmp_path, validation=held_out, logger=logger, num_sanity_val_steps=1)
    with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8") as file:
        logged = {name: float(value) for name, value in next(csv.DictReader(file)).items() if value}
    assert logged["val/accuracy"] == pytest.approx(2 / 6)
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value, rel=1e-4), name
    shown = [row for row in held_out if row["solution"]]
    with torch.no_grad():
        rolled = act(alone, shown, "teacher", temperature=0.0)
    assert logged["val/teacher/accuracy"] == pytest.approx(2 / 5), "only where its view shows it something"
    assert logged["val/teacher/length"] == pytest.approx(float(rolled.length.float().mean()))
    assert "val/average/accuracy" not in logged, "just the student again"
    who = [json.loads(line)["who"] for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert who == ["teacher", "student"]


def test_nothing_before_training_if_so_configured(world, held_out, tmp_path):
    module = world.alone(reward=IsEven(), evaluation=Evaluation(before=False))
    world.fit(module, tmp_path, validation=held_out, num_sanity_val_steps=0)
    assert not (tmp_path / "samples.jsonl").exists()


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 3}, r"evaluation\.samples=3 greedy samples would be equal; set evaluation\.temperature"),
        ({"samples": 0}, r"evaluation\.samples must be >= 1, got 0"),
        ({"temperature": -1.0}, r"evaluation\.temperature must be >= 0"),
        ({"top_p": 2.0}, r"evaluation\.top_p must be in \(0, 1\]"),
        ({"horizon": 0}, r"evaluation\.horizon must be >= 1"),
        ({"metrics": {"length": LongerIsBetter()}}, r"evaluation\.metrics: length is measured anyway"),
    ],
)
def test_what_cannot_be_is_refused_when_built(settings, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(**settings)
