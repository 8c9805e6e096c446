"""Judges behind chat endpoints: what they read, how strictly they are read, and what becomes of a run that asks one."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import yaml

from opd_lightning.cli import run
from opd_lightning.endpoint import Budget, BudgetSpent, Endpoint
from opd_lightning.endpoint_reward import Unreadable
from opd_lightning.modalities.autoregressive import Feedback, Judge, PromptView
from opd_lightning.objective import GroupRelative, Objective, PolicyGradient, Term
from opd_lightning.scoring import RewardError, Scoring
from tests.chatting import graded
from tests.processes import start
from tests.tiny import act, make_module, make_rows, no_teacher

ROW = {"prompt": "2+2=", "answer": "4"}
SECRET = "sk-very-secret-0123"
QUICK = {"timeout": 5.0, "deadline": 5.0}


@pytest.fixture
def judge(tmp_path):
    def make(server, endpoint=None, **settings):
        settings_of_endpoint = QUICK | {"keep": str(tmp_path / "asked")} | (endpoint or {})
        return Judge(Endpoint(server.url, **settings_of_endpoint), **settings)

    return make


def read(body):
    return "\n".join(message["content"] for message in body["messages"])


# -- what it is asked and how it is read ------------------------------------------------------------------------------


def test_a_grade_becomes_a_reward_and_its_words_feedback_with_one_question(chatting, judge):
    server = chatting(graded)
    one = judge(server, rubric="Be strict.")
    assert (one("4", ROW), one.feedback("4", ROW)) == (0.7, "well")
    (body,) = server.bodies
    assert body["temperature"] == 0.0
    assert body["response_format"]["json_schema"]["schema"]["properties"]["grade"]["maximum"] == 10
    assert all(text in read(body) for text in ("2+2=", "A right answer:\n=====\n4", "Be strict.", "to 10"))


def test_rows_without_an_answer_empty_completions_and_chats(chatting, judge):
    server = chatting(graded)
    one = judge(server, best=7)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "What is it?"}]},
    ]
    assert one("", {"prompt": chat}) == 1.0
    text = read(server.bodies[0])
    assert "system: Be brief.\nuser: <image>What is it?" in text
    assert "No right answer is given." in text
    assert one.columns == ()


def test_a_view_of_ones_own_reads_columns(chatting, judge):
    server = chatting(graded)
    one = judge(server, view=PromptView("{{ rubric }}: {{ written }} ({{ grade_by }})"), structured=False, rubric="!")
    assert one.columns == ("rubric",)
    assert one("4", ROW | {"rubric": "sums"}) == 0.7
    assert (read(server.bodies[0]), "response_format" in server.bodies[0]) == ("sums: 4 (!)", False)
    assert one("4", ROW) is None, "there is nothing to show"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "7",
        "Grade: 7",
        '{"grade": 7}',
        graded({}, 11),
        graded({}, -1),
        graded({}, 7.5),
        graded({}, "7"),
        graded({}, True),
        graded({}, None),
        graded({}, 7, ["well"]),
        graded({}) + " I hope that helps",
        graded({}).replace("7", "NaN"),
        graded({}).replace("}", ', "more": 1}'),
        "[" * 100_000,
    ],
)
def test_what_is_not_the_answer_that_was_asked_for_is_no_zero(chatting, judge, answer):
    server = chatting(lambda body: answer)
    one = judge(server)
    assert one("4", ROW) is None
    assert (one.failures["unreadable"], one.measured()["unreadable"]) == (1, 1.0)
    with pytest.raises(Unreadable, match="with unreadable: abstain such rows count nowhere"):
        judge(server, unreadable="stop")("4", ROW)


def test_a_fence_is_no_fault(chatting, judge):
    assert judge(chatting(lambda body: f"```json\n{graded(body)}\n```\n"))("4", ROW) == 0.7


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"best": 0}, "best is 0"), ({"unreadable": "zero"}, "'abstain' or 'stop'"), ({"max_tokens": 0}, "at least 1")],
)
def test_what_cannot_be_meant_is_refused(chatting, judge, settings, message):
    with pytest.raises(ValueError, match=message):
        judge(chatting(graded), **settings)


# -- how calls are made -----------------------------------------------------------------------------------------------


def test_a_generation_batch_is_asked_about_at_once_and_equal_completions_once(tiny_student, chatting, judge):
    flying, most, lock = [0], [0], threading.Lock()

    def slow(body):
        with lock:
            flying[0] += 1
            most[0] = max(most[0], flying[0])
        time.sleep(0.1)
        with lock:
            flying[0] -= 1
        return graded(body)

    server = chatting(slow)
    module = make_module(tiny_student, None, no_teacher(), reward=judge(server, {"at_once": 4}))
    acted = act(module, [make_rows()[4]] * 8)
    rewards, _ = module.rewards(acted)
    assert rewards == [0.7] * 8
    assert len(server.bodies) == len({*module.completions(acted)})
    assert 1 < most[0] <= 4


def test_the_time_limit_of_rewards_is_not_that_of_endpoints(chatting, judge):
    one = judge(chatting(lambda body: time.sleep(0.3) or graded(body)))
    assert Scoring(timeout=0.1)(one, "4", ROW) == 0.7


def test_a_server_that_is_gone_stops_or_abstains_as_the_configuration_says(chatting, judge):
    one = judge(chatting(lambda body: (500, "broken")), {"deadline": 0.3})
    with pytest.raises(RewardError, match=r"Judge raised ConnectionError: no answer within 0\.3 s.*answered 500"):
        Scoring()(one, "4", ROW)
    abstaining = Scoring(on_failure="abstain")
    began = time.monotonic()
    abstaining.ahead(one, ["4"] * 20, [ROW] * 20)
    with pytest.warns(UserWarning, match="counts as abstained"):
        assert [abstaining(one, "4", ROW) for _ in range(20)] == [None] * 20
    assert time.monotonic() - began < 3, "each is not waited for anew"


def test_the_end_of_a_budget_is_no_abstention(chatting, judge):
    one = judge(chatting(graded), {"budget": Budget(tokens=42)})
    abstaining = Scoring(on_failure="abstain")
    assert abstaining(one, "4", ROW) == 0.7
    for call in (lambda: abstaining(one, "5", ROW), lambda: abstaining.ahead(one, ["5"], [ROW])):
        with pytest.raises(BudgetSpent, match="a resumed run asks for none of them again"):
            call()


def test_a_run_that_ends_waits_for_no_answer(tiny_student, chatting, judge, tmp_path):
    """Threads would keep the process alive until the deadline."""
    one = judge(chatting(lambda body: (500, "broken")), {"deadline": 600.0})
    about = judge(chatting(graded), {"deadline": 600.0, "keep": str(tmp_path / "other")})
    objective = Objective([Term(PolicyGradient(GroupRelative()), teacher=None)])
    notes = {"feedback": Feedback(of=None, judge=about)}
    module = make_module(tiny_student, None, objective, reward=one, notes=notes)
    one.endpoint.ask([{"role": "user", "content": "?"}])
    about("4", ROW)
    assert one.endpoint.client._threads is not None
    assert about.endpoint.client._threads is not None
    module.release()
    assert one.endpoint.client._threads is about.endpoint.client._threads is None


# -- runs -------------------------------------------------------------------------------------------------------------


def configuration(student, server, root, **endpoint):
    settings = {"url": server.url, "keep": str(root / "asked"), "deadline": 5.0} | endpoint
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()), encoding="utf-8")
    advantage = {"class_path": "PolicyGradient", "init_args": {"advantage": "GroupRelative"}}
    config = {
        "trainer": {"default_root_dir": str(root), "accelerator": "cpu", "max_steps": 4, "log_every_n_steps": 1},
        "checkpoint": {"every_n_train_steps": 1},
        "model": {
            "class_path": "TextDistillation",
            "init_args": {
                "student": {"path": str(student)},
                "objective": {"terms": [{"signal": advantage, "teacher": None}]},
                "rollout": {"batch_size": 2, "group_size": 4, "horizon": 8},
                "evaluation": {"before": False},
                "reward": {"class_path": "Judge", "init_args": {"endpoint": settings}},
            },
        },
        "data": {"class_path": "PromptData", "init_args": {"train": str(root / "rows.jsonl")}},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["fit", "-c", str(root / "run.yaml")]


def by_length(body):
    return "no JSON" if len(read(body)) % 5 == 0 else graded(body, len(read(body)) % 11)


def test_a_run_whose_budget_ends_goes_on_and_asks_nothing_twice(
    tiny_student, chatting, tmp_path, monkeypatch, capfd, caplog
):
    monkeypatch.setenv("OPD_CHAT_KEY", SECRET)
    monkeypatch.chdir(tmp_path)
    roots = {name: tmp_path / name for name in ("whole", "cut")}
    for root in roots.values():
        root.mkdir()
    whole, cut = chatting(by_length), chatting(by_length)
    run(configuration(tiny_student, whole, roots["whole"]))
    total = 42 * len(whole.bodies)
    with pytest.raises(BudgetSpent):
        run(configuration(tiny_student, cut, roots["cut"], at_once=1, budget={"tokens": total // 2}))
    run([*configuration(tiny_student, cut, roots["cut"], at_once=1, budget={"tokens": total}), "--ckpt_path=last"])
    assert len(cut.bodies) == len(whole.bodies) == len({read(body) for body in cut.bodies})
    printed = capfd.readouterr()
    assert f"0 of {total // 2:,} tokens spent so far in" in caplog.text
    (metrics,) = roots["whole"].rglob("metrics.csv")
    logged = metrics.read_text(encoding="utf-8")
    assert all(f"train/judge/{name}" in logged for name in ("unreadable", "tokens", "money"))
    assert SECRET not in printed.out + printed.err + caplog.text
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def test_it_is_a_judge_of_feedback(tiny_student, chatting, judge):
    server = chatting(lambda body: graded(body, 3, "You forgot the carry."))
    one = judge(server)
    module = make_module(tiny_student, None, no_teacher(), notes={"feedback": Feedback(of=None, judge=one)})
    noted = module.notes["feedback"](module, act(module, make_rows(3)))
    assert [row["feedback"] for row in noted.notes] == ["You forgot the carry."] * 3


def test_it_takes_the_place_of_the_rules_of_visd_as_the_overlay_says(chatting, tmp_path):
    server = chatting(lambda body: graded(body, 3, "?"))
    path = Path(__file__).parents[3] / "configs" / "methods" / "visd.yaml"
    (said,) = [line for line in path.read_text(encoding="utf-8").splitlines() if "judge=Judge" in line]
    options = said.removeprefix("#").replace("URL", server.url).split()
    endpoint = "--model.notes.feedback.init_args.judge.init_args.endpoint"
    files = ["-c", "opd:text/quickstart.yaml", "-c", "opd:methods/visd.yaml"]
    small = ["--trainer.max_steps=1", "--trainer.logger=false", "--trainer.limit_val_batches=0"]
    small += ["--model.evaluation.before=false", "--data.train_options.count=16"]
    places = [f"{endpoint}.keep={tmp_path / 'asked'}", f"--trainer.default_root_dir={tmp_path}"]
    run(["fit", *files, *options, *small, *places])
    assert server.bodies


@pytest.mark.parametrize("setting", [f"key={SECRET}", f"url=http://me:{SECRET}@host"])
def test_a_key_in_the_wrong_place_is_not_repeated(setting):
    endpoint = "--model.reward.init_args.endpoint"
    ended = start(
        Path("opd:text/quickstart.yaml"), "--model.reward=Judge", f"{endpoint}.url=http://host", f"{endpoint}.{setting}"
    )
    assert ended.end() == 1
    assert f"what the command line says: {endpoint}.{setting.partition('=')[0]}\n" in ended.output
    assert SECRET not in ended.output
