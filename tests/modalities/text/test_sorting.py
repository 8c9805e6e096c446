"""Sorting by made-up orders: rows are right, slips are undone, held-out problems are new, columns are what they say."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest

from opd_lightning.modalities.text.quickstart import character_tokenizer
from opd_lightning.modalities.text.sorting import ALPHABET, SWAPS, inversions, is_held_out, key, problems, worked
from opd_lightning.reward import ExactMatch


def asked(row: dict[str, str]) -> tuple[int, str]:
    """The order and the letters of a row's prompt, without what it is shown."""
    order, letters = row["prompt"].rpartition("?")[2].removesuffix("=").split(":")
    return int(order), letters


def replayed(order: int, text: str, completion: str) -> tuple[list[str], list[str]]:
    """What its lines are: ``right``, ``undone`` later, ``lost`` or ``restored``; and the states that were meant."""
    kinds, states = [], [text]
    *lines, answer = completion.split(" ")
    for line, after in pairwise([*lines, ""]):
        lost = after.startswith("!")
        meant, state = (after if lost else line).removeprefix("!"), states[-1]
        if line.startswith("!"):
            assert kinds[-1] == "lost"
            kinds.append("restored")
            continue
        if lost:
            assert sum(a != b for a, b in zip(line, meant, strict=True)) == 1
            assert len(set(line)) == len(text) - 1, "a letter is there twice"
        moved = [i for i in range(len(text)) if meant[i] != state[i]]
        pairs = moved[::2]
        assert moved == [place for i in pairs for place in (i, i + 1)]
        assert pairs
        assert all(meant[i : i + 2] == state[i : i + 2][::-1] for i in pairs)
        right = [key(state[i], order) > key(state[i + 1], order) for i in pairs]
        assert all(right) or len(right) == 1
        kinds.append("lost" if lost else "right" if all(right) else "undone")
        states.append(meant)
    assert answer == f"#{states[-1]}"
    assert inversions(states[-1], order) == 0
    return kinds, states


def test_an_order_gives_every_letter_a_place_of_its_own_and_no_two_orders_are_alike_or_opposite():
    letters = "abcdefghijklmnopqrstuvwxyz"
    orders = ["".join(sorted(letters, key=lambda letter, order=order: key(letter, order))) for order in range(8)]
    assert len({*orders, *(order[::-1] for order in orders)}) == 16
    assert all(len({key(letter, order) for letter in letters}) == 26 for order in range(8))


@pytest.mark.parametrize("held_out", [False, True])
def test_every_row_is_right(held_out):
    rows = problems(150, seed=5, held_out=held_out)
    assert len({row["prompt"] for row in rows}) == 150
    for row in rows:
        order, text = asked(row)
        assert len(set(text)) == 10
        assert is_held_out(text, order) == held_out
        assert row["answer"] == "".join(sorted(text, key=lambda letter, order=order: key(letter, order)))
        for column in ("solution", "completion"):
            kinds, _ = replayed(order, text, row[column])
            assert set(kinds) == {"right"}
        assert SWAPS[0] <= inversions(text, order) <= SWAPS[1]
        assert re.fullmatch(r"([a-z]\d){10}", row["hint"])
        assert all(row["answer"][int(place)] == letter for letter, place in re.findall(r"(.)(\d)", row["hint"]))
        first, second = row["feedback"].split("<")
        assert second + first in row["wrong"]
        assert row["wrong"].replace(second + first, first + second) == row["answer"]
    assert all(set("".join(row.values())) <= set(ALPHABET) for row in rows)


def test_most_rollouts_have_150_to_300_tokens():
    lengths = sorted(len(row["completion"]) for row in problems(400, slips=0.05, seed=1))
    assert sum(150 <= length <= 300 for length in lengths) > 0.85 * len(lengths)
    assert 100 < lengths[0] < lengths[-1] < 400


def test_more_than_one_way_leads_to_the_answer():
    rows = problems(50, seed=1)
    assert sum(row["solution"] != row["completion"] for row in rows) > 45


def test_slips_are_undone_and_letters_that_were_lost_come_back():
    rows = problems(150, seed=2, slips=0.1)
    lines = [kind for row in rows for kind in replayed(*asked(row), row["completion"])[0]]
    share = {kind: lines.count(kind) / (len(lines) - lines.count("restored")) for kind in set(lines)}
    assert share["lost"] == pytest.approx(0.05, abs=0.015)
    assert share["undone"] == pytest.approx(0.05, abs=0.015)
    assert lines.count("lost") == lines.count("restored")
    assert all("!" not in row["solution"] for row in rows)


def test_neighbors_that_are_swapped_back_and_forth_are_still_sorted():
    way = worked("kdzraqwtbe", 1, random.Random(0), slips=0.5)
    kinds, states = replayed(1, "kdzraqwtbe", way)
    assert {"undone", "lost"} <= set(kinds)
    counts = [inversions(state, 1) for state in states]
    assert any(later > earlier for earlier, later in pairwise(counts))
    assert counts[-1] == 0


def test_the_same_arguments_give_the_same_rows_and_what_is_shown_changes_no_problem():
    assert problems(40, seed=3, slips=0.1) == problems(40, seed=3, slips=0.1)
    plain, shown = problems(400, seed=3), problems(400, seed=3, hinted={"hint": 0.5, "solution": 0.25})
    assert [asked(row) for row in plain] == [asked(row) for row in shown]
    begins = {column: sum(r["prompt"].startswith(f"{r[column]}?") for r in shown) for column in ("hint", "solution")}
    assert begins["hint"] == pytest.approx(200, abs=40)
    assert begins["solution"] == pytest.approx(100, abs=35)
    assert all(row["solution"] == other["solution"] for row, other in zip(plain, shown, strict=True))


def test_no_held_out_problem_is_a_training_problem_in_another_sequence():
    train, held_out = ({(o, *sorted(t)) for o, t in map(asked, problems(300, held_out=h))} for h in (False, True))
    assert not train & held_out
    drawn = random.Random(0)
    share = sum(is_held_out("".join(drawn.sample(ALPHABET[:26], 10)), 0) for _ in range(5000)) / 5000
    assert share == pytest.approx(0.2, abs=0.02)


def test_the_verifier_takes_right_answers_and_no_wrong_ones():
    (row,) = problems(1, seed=4)
    verifier = ExactMatch(after="#")
    assert verifier(row["solution"], row) == 1
    assert verifier(row["solution"].replace(row["answer"], row["wrong"]), row) == 0
    assert verifier(row["solution"].partition("#")[0], row) == 0


def test_every_character_has_a_token():
    tokenizer = character_tokenizer(ALPHABET)
    (row,) = problems(1, slips=0.2, hinted={"feedback": 1.0})
    for text in row.values():
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"orders": 9}, "orders must be 1 to 8, got 9"),
        ({"letters": 7}, "letters must be 9 or 10, got 7"),
        ({"slips": 1.0}, "shares must be in"),
        ({"hinted": {"hint": 0.7, "answer": 0.7}}, "shares must be in"),
        ({"hinted": {"hints": 0.7}}, "there is no column 'hints' to show; there are answer, solution, "),
    ],
)
def test_what_can_not_be_drawn_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        problems(10, **arguments)
