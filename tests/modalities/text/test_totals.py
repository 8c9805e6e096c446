"""Running totals: rows are right, slips are noticed and undone, held-out problems are new, columns are true."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest

from opd_lightning.modalities.text.quickstart import character_tokenizer
from opd_lightning.modalities.text.totals import ALPHABET, STEP, FirstSlip, is_held_out, problems, worked
from opd_lightning.reward import ExactMatch


def asked(row: dict[str, str]) -> str:
    """The letters and digits of a row's prompt, without what it is shown."""
    return row["prompt"].rpartition("?")[2].removesuffix("=")


def replayed(items: str, completion: str) -> list[str]:
    """What its steps are: ``right``, ``slip``, ``built`` on a slip, or ``again`` after one; whatever the answer is."""
    value = dict(zip(items[::2], map(int, items[1::2]), strict=True))
    kinds: list[str] = []
    *steps, answer = completion.split(" ")
    place, total, slipped = 0, 0, None
    for step in steps:
        mark, before, added, after = STEP.fullmatch(step).groups()
        if mark:
            (place, total), slipped = slipped, None
        letters, read = added[::2], [int(digit) for digit in added[1::2]]
        assert int(before) == total, "a step begins where the last one ended"
        assert letters == items[2 * place : 2 * place + 2 * len(letters) : 2]
        right = read == [value[letter] for letter in letters] and int(after) == (total + sum(read)) % 100
        if not right:
            assert slipped is None, "no second slip before the first is undone"
            slipped = place, total
        kinds.append("again" if mark and right else "slip" if not right else "built" if slipped else "right")
        place, total = place + len(letters), int(after)
    assert slipped is None
    assert place == len(value)
    assert answer == f"#{total:02d}"
    return kinds


@pytest.mark.parametrize("held_out", [False, True])
def test_every_row_is_right(held_out):
    rows = problems(100, slips=0.05, seed=5, held_out=held_out)
    assert len({row["prompt"] for row in rows}) == 100
    for row in rows:
        items = asked(row)
        assert is_held_out(items[1::2]) == held_out
        assert items[::2] in "abcdefghijklmnopqrstuvwxyz"
        assert len(items) == 52
        assert int(row["answer"]) == sum(map(int, items[1::2])) % 100
        assert set(replayed(items, row["solution"])) == {"right"}
        for column in ("solution", "completion"):
            replayed(items, row[column])
            assert row[column].endswith(f"#{row['answer']}")
        assert row["wrong_answer"] != row["answer"]
        assert len(row["wrong_answer"]) == 2
        assert row["other_prompt"] in {row["prompt"] for row in rows}
    assert all(set("".join(row.values())) <= set(ALPHABET) for row in rows)


def test_the_hint_and_the_feedback_are_true_on_every_way():
    for row in problems(30, seed=6):
        totals = dict(re.findall(r"([a-z])(\d\d)", row["hint"]))
        for _, _, added, after in STEP.findall(row["solution"]) + STEP.findall(row["completion"]):
            assert totals[added[-2]] == after
        _, before, added, after = STEP.fullmatch(row["correction"]).groups()
        assert totals[added[0]] == after
        assert added in asked(row)
        assert (int(before) + int(added[1])) % 100 == int(after)


def test_rollouts_have_150_to_300_tokens():
    lengths = [len(row["completion"]) for row in problems(300, slips=0.03, seed=1)]
    assert sum(150 <= length <= 300 for length in lengths) > 0.97 * len(lengths)


def test_more_than_one_way_leads_to_the_answer():
    rows = problems(50, seed=1)
    assert all(row["solution"] != row["completion"] for row in rows)
    assert len({len(row["solution"]) for row in rows}) > 5


def test_slips_are_noticed_at_once_or_later_and_undone():
    rows = problems(150, seed=2, slips=0.1)
    kinds = [kind for row in rows for kind in [*replayed(asked(row), row["completion"]), "end"]]
    at_risk = len(kinds) - kinds.count("built") - kinds.count("end")
    assert kinds.count("slip") / at_risk == pytest.approx(0.1, abs=0.015)
    late = sum(after == "built" for kind, after in pairwise(kinds) if kind == "slip")
    assert late / kinds.count("slip") == pytest.approx(1 / 3, abs=0.1)
    assert all("!" not in row["solution"] for row in rows)


def test_a_slip_in_the_last_step_is_noticed_too():
    kinds = [replayed("a1b2c3", worked("a1b2c3", random.Random(seed), slips=0.4)) for seed in range(60)]
    assert any(way[-2:] == ["slip", "again"] for way in kinds)


def test_the_same_arguments_give_the_same_rows_and_what_is_shown_changes_no_problem():
    assert problems(40, seed=3, slips=0.1) == problems(40, seed=3, slips=0.1)
    plain, shown = problems(400, seed=3), problems(400, seed=3, hinted={"hint": 0.5, "solution": 0.25})
    assert [asked(row) for row in plain] == [asked(row) for row in shown]
    begins = {column: sum(r["prompt"].startswith(f"{r[column]}?") for r in shown) for column in ("hint", "solution")}
    assert begins["hint"] == pytest.approx(200, abs=40)
    assert begins["solution"] == pytest.approx(100, abs=35)
    assert all(row["solution"] == other["solution"] for row, other in zip(plain, shown, strict=True))


def test_no_held_out_problem_has_the_digits_of_a_training_problem():
    train, held_out = (
        {asked(row)[1::2] for row in problems(300, fewest=3, most=4, held_out=held_out)} for held_out in (False, True)
    )
    assert not train & held_out
    assert sum(is_held_out(f"{number:04d}") for number in range(5000)) / 5000 == pytest.approx(0.2, abs=0.02)


def test_the_verifier_takes_right_answers_and_no_wrong_ones():
    (row,) = problems(1, slips=0.1, seed=4)
    verifier = ExactMatch(after="#")
    assert verifier(row["completion"], row) == 1
    assert verifier(f"{row['solution'][:-2]}{row['wrong_answer']}", row) == 0
    assert verifier(row["solution"].partition("#")[0], row) == 0


def test_every_character_has_a_token():
    tokenizer = character_tokenizer(ALPHABET)
    (row,) = problems(1, slips=0.2, hinted={"correction": 1.0})
    for text in row.values():
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fewest": 2}, "3 <= fewest <= most <= 26 digits, got fewest=2 and most=26"),
        ({"most": 27}, "got fewest=26 and most=27"),
        ({"most": 20}, "got fewest=26 and most=20"),
        ({"slips": 1.0}, "shares must be in"),
        ({"hinted": {"hint": 0.7, "answer": 0.7}}, "shares must be in"),
        ({"hinted": {"hints": 0.7}}, "there is no column 'hints' to show; there are answer, solution, "),
    ],
)
def test_what_can_not_be_drawn_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        problems(10, **arguments)


@pytest.mark.parametrize(
    ("completion", "words"),
    [
        ("00a6=06 06b1=07 07c5=12 #12", None),
        ("00a6=06 06b1=08 08c5=13 #13", "06b1=07"),  # what builds on a slip is not named
        ("00a6=06 06b1c5=13 #13", "06b1c5=12"),  # two digits at once
        ("00a6=06 06b1=08 !06b1=07 07c5=13 #13", "07c5=12"),  # the first slip was undone
        ("00a6=06 06b1=08 08c5=13 !06b1=07 07c5=12 #13", "#12"),
        ("00a6=06 06c5=11 #11", "06b1=07"),  # a digit was left out
        ("00a6=06 06b3=09 #09", "06b1=07"),  # a digit was misread
        ("00a6=06 06b1=07 #07", "07c5=12"),  # ended too early
        ("00a6=06 06b1=07 07c5=12", "#12"),
        ("00a6=06 06b1=07 07c5=12 12d0=12 #99", "#12"),  # beyond the last digit
        ("00a6=06 nonsense #12345", "06b1=07"),
        ("", "00a6=06"),
    ],
)
def test_the_verifier_names_the_step_that_went_wrong_first(completion, words):
    for shown in ("", "12?"):
        assert FirstSlip().feedback(completion, {"prompt": f"{shown}a6b1c5=", "answer": "12"}) == words


def test_the_verifier_is_silent_on_right_texts_with_slips_undone():
    for row in problems(100, slips=0.2, seed=3):
        assert FirstSlip().feedback(row["completion"], row) is None
