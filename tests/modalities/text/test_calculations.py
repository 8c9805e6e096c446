"""The task with a calculator: right, deterministic, and with the errors that tools really answer."""

from __future__ import annotations

import pytest

from opd_lightning.modalities.autoregressive import Tools
from opd_lightning.modalities.autoregressive.tools import calls, malformed
from opd_lightning.modalities.text.calculations import calculate, called, is_held_out, problems, tokenizer

TOOLS = Tools(["opd_lightning.modalities.text.calculations.calculate"], describe=False)


def answered(turn: str) -> str:
    (message,) = TOOLS.step({"calls": 0}, turn).observation
    return message["content"]


def numbers(rows: list[dict]) -> set[str]:
    return {str(row["prompt"][0]["content"]) for row in rows}


@pytest.mark.parametrize(("lapses", "habits"), [(0.0, 0.0), (0.6, 0.0), (0.0, 0.7)])
def test_conversations_are_those_that_tools_would_have(lapses, habits):
    for row in problems(300, lapses=lapses, habits=habits, seed=3):
        chat = [*row["prompt"], *row["completion"]]
        assert [message["role"] for message in chat] == [
            "user",
            *["assistant", "tool"] * (len(chat) // 2 - 1),
            "assistant",
        ]
        assert int(row["answer"]) == eval(chat[0]["content"])
        for turn, observation in zip(chat[1:-1:2], chat[2:-1:2], strict=True):
            assert observation["content"] == answered(turn["content"])
        errors = ["error: " in message["content"] for message in chat]
        if not habits:
            assert chat[-1]["content"] == row["answer"]
            assert not any(errors[len(row["prompt"]) :]), "what is learned has no error"
            assert [m["content"] for m in row["completion"][1::2]][-1] == row["answer"]
        if not lapses and not habits:
            assert len(chat) == 6


def test_lapses_and_habits_have_their_shares():
    lapsed = [len(row["prompt"]) > 1 for row in problems(1000, lapses=0.5, seed=1)]
    assert sum(lapsed) == pytest.approx(500, abs=60)
    right = [row["completion"][-1]["content"] == row["answer"] for row in problems(1000, habits=0.7, seed=1)]
    assert sum(right) == pytest.approx(440, abs=60)  # a fifth has a form without a habit


def test_the_same_arguments_give_the_same_rows_and_none_is_held_out_and_trained():
    assert problems(50, seed=3, lapses=0.5) == problems(50, seed=3, lapses=0.5)
    assert not numbers(problems(2000, seed=3)) & numbers(problems(500, seed=3, held_out=True))
    assert sum(is_held_out(a, 10, 999 - a) for a in range(100, 900)) == pytest.approx(160, abs=40)
    with pytest.raises(ValueError, match=r"shares must be in \[0, 1\], got lapses=2"):
        problems(1, lapses=2)


@pytest.mark.parametrize("expression", ["1", "1+2+3", "1/2", "1 + 2", "a+b", "1**2", "9" * 13 + "+1", "(1+2)", ""])
def test_the_calculator_takes_one_operation(expression):
    assert calculate("12*34") == 408
    with pytest.raises(ValueError, match="one operation of two numbers at a time"):
        calculate(expression)
    assert answered(called(expression)).startswith("error: ValueError: one operation")


def test_every_text_of_a_conversation_is_read_as_it_is_written():
    made = tokenizer()
    for row in problems(200, lapses=0.7, seed=2):
        text = made.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
        ids = made(text, add_special_tokens=False)["input_ids"]
        assert made.unk_token_id not in ids
        assert made.decode(ids) == text


def test_calls_are_counted_in_the_conversation():
    (row,) = problems(1, seed=4)
    made = tokenizer()
    text = made.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
    assert calls("", {"conversation": text}) == 2
    assert malformed("", {"conversation": text}) == 0
    broken = called("1+2", name="compute")
    text = made.apply_chat_template(
        [{"role": "assistant", "content": broken}, {"role": "tool", "content": answered(broken)}], tokenize=False
    )
    assert calls("", {"conversation": text}) == malformed("", {"conversation": text}) == 1
