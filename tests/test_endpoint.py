"""Chat endpoints: what is asked, kept and paid for, and every way in which one may fail."""

from __future__ import annotations

import json
import sqlite3
import time
import traceback

import pytest

from opd_lightning.connection import Refused
from opd_lightning.endpoint import Budget, BudgetSpent, Endpoint
from tests.chatting import completion

ASKED = [{"role": "user", "content": "2+2?"}]
SECRET = "sk-very-secret-0123"
QUICK = {"timeout": 5.0, "deadline": 5.0}


@pytest.fixture
def endpoint(tmp_path):
    def make(server, **settings):
        return Endpoint(getattr(server, "url", server), **QUICK | {"keep": str(tmp_path / "asked")} | settings)

    return make


def test_it_sends_messages_and_settings_to_the_model_that_is_listed(chatting, endpoint):
    server = chatting(lambda body: "4")
    reply = (
        endpoint(server, extra={"top_p": 0.9, "max_tokens": None}).ask(ASKED, temperature=0.5, max_tokens=3).result()
    )
    assert (reply.text, reply.cut, reply.read, reply.written) == ("4", False, 30, 12)
    assert server.bodies == [{"model": "a-model", "messages": ASKED, "temperature": 0.5, "top_p": 0.9}]


def test_a_path_of_its_own_is_asked_there(chatting, endpoint):
    server = chatting(lambda body: "4")
    assert endpoint(server.url + "/v1/", model="m").ask(ASKED).result().text == "4"
    with pytest.raises(Refused, match="answered 404"):
        endpoint(server.url + "/elsewhere", model="m").ask([*ASKED, *ASKED]).result()


def test_nothing_is_asked_for_twice_by_whichever_run(chatting, endpoint):
    server = chatting(lambda body: str(len(server.bodies)))
    one = endpoint(server)
    futures = [one.ask(ASKED) for _ in range(5)]
    assert {future.result().text for future in futures} == {"1"}
    assert endpoint(server).ask(ASKED).result().text == "1"
    others = [one.ask(ASKED, draw=1), one.ask(ASKED, temperature=1.0), endpoint(server, model="other").ask(ASKED)]
    assert sorted(future.result().text for future in others) == ["2", "3", "4"]
    assert endpoint(server).spent() == (4 * 42, 0.0)


def test_a_budget_of_tokens_ends_with_an_error_and_loses_nothing(chatting, endpoint, capsys, recwarn):
    server = chatting(lambda body: "4")
    budget = Budget(tokens=84)
    questions = [[{"role": "user", "content": str(i)}] for i in range(3)]
    one = endpoint(server, budget=budget)
    for question in questions[:2]:
        one.ask(question).result()
    with pytest.raises(BudgetSpent, match=r"is spent: 84 of 84 tokens, counted in .*answers\.sqlite.*Nothing is lost"):
        one.ask(questions[2]).result()
    again = endpoint(server, budget=Budget(tokens=200))
    assert [again.ask(question).result().text for question in questions] == ["4"] * 3
    assert len(server.bodies) == 3, "what was answered before was not asked for again"


def test_a_budget_of_money_needs_prices_and_counts_by_them(chatting, endpoint):
    server = chatting(lambda body: "4")
    one = endpoint(server, budget=Budget(money=0.01, input=100.0, output=1000.0))
    one.ask(ASKED).result()
    assert one.spent() == (42, pytest.approx((30 * 100 + 12 * 1000) / 1e6))
    with pytest.raises(BudgetSpent, match=r"0\.015 of 0\.01 in money"):
        one.ask(ASKED, draw=1).result()


def test_the_log_says_the_budget_at_the_start_and_near_the_end(chatting, endpoint, caplog, recwarn):
    server = chatting(lambda body: "4")
    one = endpoint(server, budget=Budget(tokens=90))
    with caplog.at_level("INFO"):
        for draw in range(3):
            one.ask(ASKED, draw=draw).result()
    assert "asking a-model at" in caplog.text
    assert "0 of 90 tokens spent so far" in caplog.text
    assert any("nears its end: 84 of 90 tokens" in str(warning.message) for warning in recwarn)


def test_a_budget_needs_a_server_that_counts(chatting, endpoint):
    server = chatting(lambda body: (200, completion("4", usage=None)))
    assert endpoint(server).ask(ASKED).result().text == "4"
    with pytest.raises(ValueError, match="does not say how many tokens"):
        endpoint(server, budget=Budget(tokens=100)).ask(ASKED, draw=1).result()


@pytest.mark.parametrize("tokens", [-1, 1.0, True, 10**30, None])
def test_tokens_that_are_no_count_are_not_counted(chatting, endpoint, tokens):
    usage = {"prompt_tokens": tokens, "completion_tokens": 3}
    server = chatting(lambda body: (200, completion("4", usage=usage)))
    assert endpoint(server).ask(ASKED).result().counted is False
    assert endpoint(server).spent() == (0, 0.0)


def test_half_a_character_is_none(chatting, endpoint):
    text = endpoint(chatting(lambda body: "\ud800 four \ud83d\ude42")).ask(ASKED).result().text
    assert text == "\ufffd four \U0001f642"


@pytest.mark.parametrize(
    "rubbish", [b"<html>busy</html>", {"choices": []}, {"choices": [{"message": {"content": 7}}]}, [], b"[" * 100_000]
)
def test_rubbish_is_asked_for_again_and_then_an_error(chatting, endpoint, rubbish):
    server = chatting(lambda body: (200, rubbish) if len(server.bodies) < 3 else "4")
    assert endpoint(server).ask(ASKED).result().text == "4"
    always = chatting(lambda body: (200, rubbish))
    with pytest.raises(ValueError, match="3 times with something that is no chat completion"):
        endpoint(always).ask(ASKED, draw=1).result()
    assert len(always.bodies) == 3


@pytest.mark.parametrize("code", [429, 500, 503])
def test_what_passes_is_tried_until_the_deadline(chatting, endpoint, code):
    server = chatting(lambda body: (code, {"error": "later"}) if len(server.bodies) < 2 else "4")
    assert endpoint(server).ask(ASKED).result().text == "4"
    always = chatting(lambda body: (code, {"error": "never"}))
    with pytest.raises(ConnectionError, match=f"answered {code}: .*never"):
        endpoint(always, deadline=0.3).ask(ASKED, draw=1).result()


def test_one_that_hangs_is_waited_for_until_the_deadline(chatting, endpoint):
    server = chatting(lambda body: time.sleep(3) or "4")
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"no answer within 0\.5 s"):
        endpoint(server, model="m", timeout=0.2, deadline=0.5).ask(ASKED).result()
    assert time.monotonic() - began < 3


def test_what_no_repetition_changes_ends_with_the_servers_words(chatting, endpoint):
    server = chatting(lambda body: (400, {"error": {"message": "unknown field temperature"}}))
    with pytest.raises(Refused, match=r"unknown field temperature.*with null in endpoint\.extra"):
        endpoint(server).ask(ASKED, temperature=0.0).result()
    assert len(server.bodies) == 1


def everything_written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_the_key_is_sent_and_nowhere_else(chatting, endpoint, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("OPD_CHAT_KEY", SECRET)
    server = chatting(lambda body: f"your key is {SECRET}")
    one = endpoint(server)
    with caplog.at_level("DEBUG"):
        assert one.ask(ASKED).result().text == "your key is ‹token›"
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
    for content in ((401, {"error": f"bad key {SECRET}"}), (200, SECRET.encode()), (200, {"choices": SECRET})):
        hostile = chatting(lambda body, content=content: content)
        with pytest.raises(ValueError, match="‹token›") as caught:
            endpoint(hostile, model=hostile.url).ask(ASKED).result()
        assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert SECRET not in repr(one) + repr(vars(one)) + caplog.text
    assert SECRET.encode() not in everything_written(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": f"http://me:{SECRET}@host"}, "more than a place"),
        ({"url": f"http://host/v1?key={SECRET}"}, "more than a place"),
        ({"url": SECRET}, "is no URL such as"),
        ({"key": SECRET}, "no name of an environment variable"),
        ({"at_once": 0}, "at_once=0 must be >= 1"),
        ({"deadline": float("nan")}, "deadline=nan > 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_not_repeated(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        Endpoint(**{"url": "http://host"} | settings)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "budget.tokens is 0"),
        ({"money": 1.0}, "a limit without prices"),
        ({"input": -1.0}, "must be >= 0"),
    ],
)
def test_a_budget_that_is_none_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Budget(**settings)


def test_a_file_that_holds_something_else_is_named(chatting, endpoint, tmp_path):
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "answers.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match=r"answers\.sqlite can't be read or written as answers"):
        endpoint(chatting(lambda body: "4")).ask(ASKED).result()


def test_what_is_kept_can_be_read(chatting, endpoint, tmp_path):
    endpoint(chatting(lambda body: "4")).ask(ASKED).result()
    with sqlite3.connect(tmp_path / "asked" / "answers.sqlite") as base:
        ((asked, text),) = base.execute("SELECT asked, text FROM answers")
    assert (json.loads(asked)[0]["messages"], text) == (ASKED, "4")
