"""Letters sorted by one of several made-up orders, line by line: a verifiable task with long rollouts.

A rollout has 150 to 300 tokens. A line swaps some of the neighbors that are in the wrong order, whichever, so that many
ways lead to the answer. A slip is undone later: by another swap or, where a letter was lost, by a line that begins with
a `!`. The orders are facts, too many for a small student, and a hint tells what follows from them.

>>> row = problems(1, seed=3)[0]
>>> row["solution"].endswith("#" + row["answer"])
True
"""

import random
import zlib
from collections.abc import Sequence
from itertools import pairwise
from string import ascii_lowercase

ALPHABET = ascii_lowercase + "0123456789 :=#!?<"
MULTIPLIERS = (2, 3, 5, 7, 11, 13, 17, 19)
"""Of the orders 0 to 7: the n-th letter of the alphabet has the key multiplier · n mod 29, all different."""
SWAPS = (25, 40)
"""Swaps of neighbors that a problem needs, the fewest and the most."""
COLUMNS = ("answer", "solution", "completion", "hint", "wrong", "feedback")


def problems(
    count: int,
    letters: int = 10,
    orders: int = 4,
    slips: float = 0.0,
    hinted: dict[str, float] | None = None,
    seed: int = 0,
    held_out: bool = False,
) -> list[dict[str, str]]:
    """Draws `count` different problems, the same ones for the same arguments.

    A problem is held out or not by a hash of its order and of which letters it has, in whatever sequence (a fifth of
    all), so that the answer to a held-out problem is never that to a training problem in the same order.

    Args:
        count: rows.
        letters: of a problem, all different, 9 or 10.
        orders: how many of the made-up orders there are, 1 to 8.
        slips: of the lines of a completion, the share that is one.
        hinted: of the prompts, the share that begins with a column and a `?`, by its name, such as ``{hint: 0.3}``: a
            model trained on some of them can later be its own teacher, shown what it will not have at test time.
        seed: of the draws.
        held_out: draw held-out problems.

    Returns rows of
        prompt: `"1:kdzraqwtbe="`, the number of the order and the letters;
        answer: the letters in that order;
        solution: lines of the letters, each after some swaps of neighbors, and the answer after a `#`;
        completion: the same with slips and what undoes them, on a way of its own;
        hint: each letter and its place in the answer, `"k4d1…"`;
        wrong: a wrong answer, two neighbors of the right one in the wrong order;
        feedback: what is wrong with it, `"d<r"`: d comes before r.
    Raises ValueError for orders and columns that there are not, shares outside of [0, 1], too few or too many letters.
    """
    if not 1 <= orders <= len(MULTIPLIERS):
        raise ValueError(f"sorting.problems: orders must be 1 to {len(MULTIPLIERS)}, got {orders}")
    if not 9 <= letters <= 10:  # fewer rarely need so many swaps; a hint has a digit for each
        raise ValueError(f"sorting.problems: letters must be 9 or 10, got {letters}")
    hinted = hinted or {}
    for column in set(hinted) - set(COLUMNS):
        raise ValueError(f"sorting.problems: there is no column {column!r} to show; there are {', '.join(COLUMNS)}")
    if not (0 <= slips < 1 and all(share >= 0 for share in hinted.values()) and sum(hinted.values()) <= 1):
        raise ValueError(f"sorting.problems: shares must be in [0, 1], got slips={slips} and hinted={hinted}")
    draw = random.Random(seed)
    rows: dict[tuple[str, int], None] = {}
    while len(rows) < count:
        order = draw.randrange(orders)
        text = "".join(draw.sample(ascii_lowercase, letters))
        if is_held_out(text, order) == held_out and SWAPS[0] <= inversions(text, order) <= SWAPS[1]:
            rows[text, order] = None
    # columns have draws of their own, so that the same problems come whatever is hinted and wherever it slips
    return [_row(text, order, slips, hinted, random.Random(f"{seed}/{order}{text}")) for text, order in rows]


def key(letter: str, order: int) -> int:
    """Returns where a letter stands in an order."""
    return MULTIPLIERS[order] * (ascii_lowercase.index(letter) + 1) % 29


def inversions(text: str, order: int) -> int:
    """Counts the swaps of neighbors without which the letters can't be sorted."""
    keys = [key(letter, order) for letter in text]
    return sum(a > b for i, a in enumerate(keys) for b in keys[i + 1 :])


def is_held_out(text: str, order: int) -> bool:
    """Tells whether a problem belongs to the held-out fifth."""
    return zlib.crc32(f"{order}{''.join(sorted(text))}".encode()) % 5 == 0


def worked(text: str, order: int, draw: random.Random, slips: float = 0.0) -> str:
    """Writes a way to the answer, line by line, with a share of slips among the lines.

    A line swaps each pair of neighbors in the wrong order with probability ⅔, and at least one: so the likeliest text
    ends. Half of the slips swap neighbors that were in order. The others write one letter twice, and the next line is
    what was meant, after a `!`.
    """
    state, lines = list(text), []
    while wrong := [i for i, (a, b) in enumerate(pairwise(state)) if key(a, order) > key(b, order)]:
        slip = draw.choice(["undone", "lost"]) if draw.random() < slips else None
        right = [i for i in range(len(state) - 1) if i not in wrong]
        places = [draw.choice(right)] if slip == "undone" and right else _some(wrong, draw)
        for i in places:
            state[i : i + 2] = state[i + 1], state[i]
        line = "".join(state)
        if slip == "lost":
            gone, twice = draw.sample(range(len(state)), 2)
            lines += [f"{line[:gone]}{line[twice]}{line[gone + 1 :]}", f"!{line}"]
        else:
            lines.append(line)
    return " ".join([*lines, f"#{''.join(state)}"])


def _some(places: Sequence[int], draw: random.Random) -> list[int]:
    """Draws about two thirds of the places, at least one, and of two places side by side the first."""
    drawn: list[int] = []
    for place in places:
        if draw.random() < 2 / 3 and place - 1 not in drawn:
            drawn.append(place)
    return drawn or [draw.choice(places)]


def _row(text: str, order: int, slips: float, hinted: dict[str, float], draw: random.Random) -> dict[str, str]:
    answer = "".join(sorted(text, key=lambda letter: key(letter, order)))
    place = draw.randrange(len(text) - 1)
    first, second = answer[place], answer[place + 1]
    row = {
        "prompt": f"{order}:{text}=",
        "answer": answer,
        "solution": worked(text, order, draw),
        "completion": worked(text, order, draw, slips),
        "hint": "".join(f"{letter}{answer.index(letter)}" for letter in text),
        "wrong": answer.replace(first + second, second + first),
        "feedback": f"{first}<{second}",
    }
    column = draw.choices([*hinted, ""], [*hinted.values(), 1 - sum(hinted.values())])[0]
    return row | {"prompt": f"{row[column]}?{row['prompt']}"} if column else row
