"""The questions that ship: how many, that none is asked in both files, and that their answers are right."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from opd_lightning.reward import JSONForm, Mentions

ASSETS = Path(__file__).parents[3] / "assets"


def load(name: str) -> list[dict[str, Any]]:
    lines = (ASSETS / "facts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def make_facts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_facts", ASSETS / "make_facts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_enough_questions_and_none_is_asked_twice():
    train, held_out = load("train"), load("validation")
    assert len(train) + len(held_out) >= 400
    assert len(held_out) >= 100
    assert {row["kind"] for row in held_out} == {row["kind"] for row in train}
    prompts = [row["prompt"].casefold() for row in train + held_out]
    assert len(set(prompts)) == len(prompts)


def test_the_files_are_those_of_the_script(make_facts):
    for name, wanted in (("train", False), ("validation", True)):
        assert load(name) == [row for held_out, row in make_facts.rows() if held_out == wanted]


@pytest.mark.parametrize("name", ["train", "validation"])
def test_every_answer_is_accepted_and_no_question_gives_its_answer_away(name):
    judge, form = Mentions(), JSONForm()
    for row in load(name):
        assert judge(row["prompt"], row) == 0, row
        for answer in [row["answer"], *row["aliases"]]:
            assert judge(f"I think that it is {answer}.", row) == 1
            written = json.dumps({"answer": answer}, ensure_ascii=False)
            assert (judge(written, row), form(written, row)) == (1, 1)


def test_unrelated_texts_are_unrelated():
    asked = {row["prompt"] for row in load("train") + load("validation")}
    rows = load("unrelated")
    assert len({row["prompt"] for row in rows}) == len(rows) >= 20
    assert all(row["completion"] and row["prompt"] not in asked for row in rows)
