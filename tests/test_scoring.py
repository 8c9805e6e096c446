"""Rewards that abstain, fail or hang: what a row counts then, and what people are told."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import time
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from opd_lightning.actor import group_statistics
from opd_lightning.callbacks import Samples, WeightExtrapolation
from opd_lightning.cli import run
from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.objective import (
    ByReward,
    GroupRelative,
    Objective,
    Outcome,
    PassRate,
    PolicyGradient,
    ReverseKL,
    RewardPlusLogRatio,
    RewardTimesLogRatio,
    Term,
)
from opd_lightning.optimizer_step import OptimizerStep
from opd_lightning.report import read_curves
from opd_lightning.reward import CallableReward, Reward
from opd_lightning.rollout_settings import Rollout
from opd_lightning.rows import Row
from opd_lightning.scoring import RewardError, Scoring
from tests.callbacks import toy
from tests.tiny import Rows, make_trainer

NAN = float("nan")
ROW = {"prompt": "1+1=\x1b[2J", "answer": "2"}


class Answering(Reward):
    """Answers what it was made with, or raises it."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.calls = answers, 0

    def __call__(self, completion: str, example: Any) -> Any:
        answer = self.answers[self.calls % len(self.answers)]
        self.calls += 1
        if isinstance(answer, Exception):
            raise answer
        return answer() if callable(answer) else answer


def endless() -> None:
    while True:
        with contextlib.suppress(Exception):  # as careless rewards do
            time.sleep(0.01)


def swallowing() -> float:
    try:
        re.fullmatch(r"(a+)+b", "a" * 60)
    except:  # noqa: E722  (as even more careless rewards do)
        return 1.0
    return 0.0


# -- one call -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        *[(1, 1.0), (True, 1.0), (False, 0.0), (-0.5, -0.5), (Fraction(1, 4), 0.25), (Decimal("0.5"), 0.5)],
        *[(np.float32(0.5), 0.5), (np.bool_(True), 1.0), (np.array(2), 2.0), (torch.tensor(0.25), 0.25)],
        *[(torch.tensor(True), 1.0), (torch.tensor(1.0, requires_grad=True), 1.0), (None, None)],
    ],
)
def test_numbers_and_none_are_answers(answer, value):
    assert Scoring()(Answering(answer), "x", ROW) == value


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (NAN, "answered nan"),
        (float("inf"), "answered inf"),
        (1e39, "answered 1e+39"),
        (10**400, "answered 1000"),
        (torch.tensor(NAN), "answered tensor(nan)"),
        (torch.ones(2), r"answered a Tensor of shape [2]"),
        (torch.ones(1, 1), r"answered a Tensor of shape [1, 1]"),
        (np.ones(3), r"answered a ndarray of shape [3]"),
        ("good", "answered 'good', of type str"),
        ("1.0", "answered '1.0', of type str"),
        ([1.0], "answered [1.0], of type list"),
        ({"score": 1}, "answered {'score': 1}, of type dict"),
        (1j, "answered 1j, of type complex"),
        (torch.tensor(1j), "answered tensor(0.+1.j)"),
        (KeyError("score"), "raised KeyError: 'score'"),
        (RuntimeError("verifier \x1b]0;crashed"), r"raised RuntimeError: verifier \x1b]0;crashed"),
        (endless, "took more than 0.2 s (model.scoring.timeout)"),
        (swallowing, "took more than 0.2 s (model.scoring.timeout)"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_whatever_else_it_does_names_reward_row_and_completion(answer, said):
    with pytest.raises(RewardError) as caught:
        Scoring(timeout=0.2)(Answering(answer), "fo\x1b[2Jur" + "!" * 500, ROW)
    message = str(caught.value)
    assert message.startswith(f"the reward Answering {said}"), message
    assert r"for the completion 'fo\x1b[2Jur!" in message
    assert r"of the row whose prompt is '1+1=\x1b[2J'" in message
    assert "\x1b" not in message
    assert len(message) < 600
    abstains = Scoring(timeout=0.2, on_failure="abstain")
    with pytest.warns(UserWarning, match="the reward Answering .* counts as abstained"):
        assert abstains(Answering(answer), "x", ROW) is None


def careless(completion: str, example: dict[str, Any]) -> Any:
    return {}["score"]


def test_the_function_of_a_callable_reward_is_named():
    reward = CallableReward(f"{__name__}.careless")
    with pytest.raises(RewardError, match=rf"the reward CallableReward \({__name__}\.careless\) raised KeyError"):
        Scoring()(reward, "x", ROW)
    row = Row(ROW)
    row.location = "rows.jsonl, row 3"
    with pytest.raises(RewardError, match=r"of rows\.jsonl, row 3, whose prompt is '1\+1=\\x1b"):
        Scoring()(reward, "x", row | {"prediction": None})


def test_a_limit_leaves_no_alarm_and_keeps_that_of_others():
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        assert Scoring()(Answering(1), "x", ROW) == 1
        with pytest.raises(RewardError):
            Scoring(timeout=0.1)(Answering(endless), "x", ROW)
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert Scoring(timeout=None)(Answering(1), "x", ROW) == 1
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize("settings", [{"timeout": 0}, {"timeout": NAN}, {"timeout": -1.0}, {"on_failure": "ignore"}])
def test_settings_that_cannot_be_meant_are_refused(settings):
    with pytest.raises(ValueError, match=rf"scoring\.{next(iter(settings))} is "):
        Scoring(**settings)


# -- means --------------------------------------------------------------------------------------------------------


def test_statistics_of_a_group_are_those_of_its_known_rewards():
    reward = torch.tensor([1.0, NAN, 0.0, NAN, NAN, 0.25])
    mean, std = group_statistics(reward, torch.tensor([0, 0, 0, 1, 1, 2]))
    torch.testing.assert_close(mean, torch.tensor([0.5, 0.5, 0.5, NAN, NAN, 0.25]), equal_nan=True)
    torch.testing.assert_close(std, torch.tensor([0.5, 0.5, 0.5, NAN, NAN, 0.0]), equal_nan=True)


TERMS = {
    "outcome": lambda: Term(ReverseKL(), weights=[Outcome()]),
    "by reward": lambda: Term(ReverseKL(), weights=[ByReward()], normalizer="weights"),
    "pass rate": lambda: Term(ReverseKL(), weights=[PassRate()]),
    "group": lambda: Term(PolicyGradient(GroupRelative()), teacher=None),
    "plus": lambda: Term(PolicyGradient(RewardPlusLogRatio())),
    "times": lambda: Term(PolicyGradient(RewardTimesLogRatio())),
}


def gradient(module: Any, batch: Any) -> list[torch.Tensor]:
    step = OptimizerStep(list(batch.split(3)))
    module.reader.prepare(step)
    module.student.zero_grad()
    for part in step.trajectories:
        student = module.distribution(module.policies["student"], part)
        streams = module.streams.query_all(module.objective.teachers(), part)
        module.objective(student, streams, part, step.normalizers).loss.backward()
    return [p.grad.clone() for p in module.student.parameters()]


@pytest.mark.parametrize("kind", TERMS)
def test_a_row_that_abstains_trains_as_if_it_were_not_there(kind, tmp_path):
    """In every term that reads rewards: value and normalizer, beside rows of its group and groups that abstain."""
    module = toy.make_module(objective=Objective([TERMS[kind]()]), reward=Answering(1), rollout=GROUPS)
    toy.fit(module, tmp_path, steps=1, rows=toy.make_rows(8))
    rolled = module.act("student", [row for row in toy.make_rows(4) for _ in range(3)], list(range(12)))
    group = torch.arange(4).repeat_interleave(3)
    module.reward = Answering(1.0, 0.0, None, None, None, None, 0.25, None, 1.0, 0.5, 1.0, 0.0)

    class Own(type(module)):
        def rewards(self, trajectories):
            rewards, shown = (
                [self.reward_of("", row) for row in trajectories.examples],
                super().rewards(trajectories)[1],
            )
            return rewards, shown

    module.__class__ = Own
    judged = module.actor.with_rewards(dataclasses.replace(rolled, group=group))
    assert judged.reward.isnan().tolist() == [False, False, True, True, True, True, False, True, *[False] * 4]
    known = judged.select((~judged.reward.isnan()).nonzero().squeeze(-1))
    for mine, expected in zip(gradient(module, judged), gradient(module, known), strict=True):
        torch.testing.assert_close(mine, expected)
        assert mine.isfinite().all()


GROUPS = Rollout(batch_size=4, group_size=2, horizon=4)


class Scored(toy.Moves):
    """Rewards of its own, in an order that does not depend on the rollout."""

    provides = frozenset({"reward"})
    pattern: tuple[Any, ...] = (1.0, None, 0.0, None, None)

    def rewards(self, trajectories):
        numbers = [int(row["prompt"]) for row in trajectories.examples]
        return [self.pattern[i % len(self.pattern)] for i in numbers], super().rewards(trajectories)[1]


def test_means_in_the_log_leave_out_rows_that_abstain(tmp_path):
    module = toy.make_module(setting=Scored, rollout=GROUPS, evaluation=Evaluation(before=True, by=["told"]))
    logger = CSVLogger(tmp_path, name="logs")
    toy.fit(module, tmp_path, steps=2, rows=toy.make_rows(8), validation=toy.make_rows(10), logger=logger)
    curves = read_curves(tmp_path)
    assert curves["val/accuracy"][0][1] == 0.5
    assert curves["val/abstained"][0][1] == pytest.approx(0.6)
    assert curves["val/accuracy/0.0"][0][1] == 0.5
    rewards = [value for _, value in curves["train/reward"]]
    shares = [value for _, value in curves["train/abstained"]]
    # rows 0 to 7: 1, -, 0, -, -, 1, -, 0 in two generation batches
    assert sum(r * (1 - s) for r, s in zip(rewards, shares, strict=True)) == pytest.approx(2 * 2 / 8)
    assert sum(shares) == pytest.approx(2 * 4 / 8)


class Silent(Scored):
    pattern = (None,)


@pytest.mark.parametrize("term", ["outcome", "group", "plus", "by reward"])
def test_a_run_whose_rewards_all_abstain_trains_nothing_and_says_so(term, tmp_path):
    objective = Objective([TERMS[term]()])
    evaluation = Evaluation(samples=2, temperature=1.0)
    module = toy.make_module(setting=Silent, objective=objective, rollout=GROUPS, evaluation=evaluation)
    before = [p.clone() for p in toy.Mover(0).parameters()]
    logger = CSVLogger(tmp_path, name="logs")
    callbacks = [Samples(every=1, count=1), WeightExtrapolation(examples=4)]
    toy.fit(module, tmp_path, callbacks, 2, toy.make_rows(8), validation=toy.make_rows(4), logger=logger)
    for parameter, start in zip(module.student.parameters(), before, strict=True):
        assert torch.equal(parameter, start)
    curves = read_curves(tmp_path)
    assert not {"val/accuracy", "val/pass@2", "train/reward"} & curves.keys()
    assert {value for _, value in curves["train/abstained"] + curves["val/abstained"]} == {1.0}


def test_other_terms_go_on_where_a_reward_abstains(tmp_path):
    objective = Objective([Term(ReverseKL()), TERMS["outcome"]()])
    module = toy.make_module(setting=Silent, objective=objective, rollout=GROUPS)
    alone = toy.make_module(rollout=GROUPS)
    for made, folder in ((module, tmp_path / "both"), (alone, tmp_path / "alone")):
        toy.fit(made, folder, steps=2, rows=toy.make_rows(8))
    for mine, expected in zip(module.student.parameters(), alone.student.parameters(), strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_run_with_abstentions_resumes_in_the_middle_of_a_generation_batch(tmp_path):
    def make():
        rollout = Rollout(batch_size=4, group_size=2, micro_batch_size=2, horizon=4)
        return toy.make_module(setting=Scored, objective=Objective([TERMS["plus"]()]), rollout=rollout), []

    toy.assert_resumes(make, tmp_path)


def test_pass_at_k_counts_prompts_all_of_whose_samples_are_known(tmp_path):
    class Own(Scored):
        def rewards(self, trajectories):
            rewards = [1.0, 0.0, None, 1.0, 0.0, 0.0][: len(trajectories)]
            return rewards, super().rewards(trajectories)[1]

    module = toy.make_module(setting=Own, evaluation=Evaluation(samples=2, temperature=1.0))
    (found,) = make_trainer(tmp_path).validate(module, datamodule=Rows([], toy.make_rows(3)), verbose=False)
    assert found["val/pass@2"] == 0.5
    assert found["val/accuracy"] == pytest.approx(2 / 5)
    assert found["val/abstained"] == pytest.approx(1 / 6)


# -- every setting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [NAN, "good", KeyError("score")], ids=str)
def test_a_failing_reward_ends_training_and_validation_by_name(answer, every_world, tmp_path):
    objective = Objective([Term(ReverseKL(), weights=[Outcome()])])
    module = every_world.module(objective=objective, reward=Answering(1, 0, answer))
    with pytest.raises(RewardError, match=r"the reward Answering .* for the completion .* prompt is "):
        every_world.fit(module, tmp_path)
    module = every_world.module(reward=Answering(answer))
    with pytest.raises(RewardError, match=r"the reward Answering .* for the completion .* prompt is "):
        make_trainer(tmp_path).validate(module, datamodule=Rows([], every_world.make_rows(4)), verbose=False)


def test_a_reward_may_abstain_in_every_setting(every_world, tmp_path):
    objective = Objective([Term(ReverseKL(), weights=[Outcome()])])
    module = every_world.module(objective=objective, reward=Answering(1, None, 0))
    every_world.fit(module, tmp_path)
    (found,) = make_trainer(tmp_path).validate(
        every_world.module(reward=Answering(1, None, 0)), datamodule=Rows([], every_world.make_rows(6)), verbose=False
    )
    assert 0 < found["val/abstained"] < 0.5
    assert found["val/accuracy"] == pytest.approx(0.5, abs=0.2)


def only_six(completion: str, example: dict[str, Any]) -> float:
    return NAN if example["answer"] == "6" else 1.0


@pytest.mark.parametrize("on_failure", ["stop", "abstain"])
def test_a_run_from_a_file_names_the_row_of_the_file(on_failure, saved, tmp_path):
    """From the configuration to the message."""
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) + "\n" for i in range(8)), encoding="utf-8"
    )
    outcome = {"signal": {"class_path": "ReverseKL"}, "weights": [{"class_path": "Outcome"}]}
    config = {
        "trainer": {"default_root_dir": str(tmp_path), "accelerator": "cpu", "max_steps": 2, "logger": False},
        "model": {
            "class_path": "TextDistillation",
            "init_args": {
                "student": {"path": str(saved())},
                "teachers": {"teacher": {"weights": {"class_path": "Live"}}},
                "objective": {"terms": [outcome]},
                "rollout": {"batch_size": 8, "horizon": 4},
                "evaluation": {"before": False},
                "reward": {"class_path": "CallableReward", "init_args": {"function": f"{__name__}.only_six"}},
                "scoring": {"timeout": 30.0, "on_failure": on_failure},
            },
        },
        "data": {"class_path": "PromptData", "init_args": {"train": str(path)}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    named = rf"CallableReward \({__name__}\.only_six\) answered nan, for .*rows\.jsonl, row 4.* prompt is '3"
    if on_failure == "stop":
        with pytest.raises(RewardError, match=named):
            run(["fit", "-c", str(tmp_path / "run.yaml")])
    else:
        with pytest.warns(UserWarning, match=f"{named}.* counts as abstained"):
            run(["fit", "-c", str(tmp_path / "run.yaml")])
