"""Running totals of many digits, step by step: a verifiable task with long rollouts.

A rollout has 150 to 300 tokens. A step adds one digit or two, as it likes, so that many ways lead to the answer: short
ones with harder sums, or long ones with easier sums. Every digit has a letter, and a step begins with the total so far:
so a slip can still be noticed some steps later, and a `!` goes back to the step that had it and does it again.

>>> row = problems(1, fewest=3, most=3, seed=7)[0]
>>> row["prompt"], row["completion"]
('a9b3c0=', '00a9=09 09b3=12 12c0=12 #12')
"""

import random
import re
import zlib
from string import ascii_lowercase

from ...reward import ExactMatch, Example

ALPHABET = ascii_lowercase + "0123456789= !#?"
MODULUS = 100
COLUMNS = ("answer", "solution", "completion", "hint", "wrong_answer", "correction")
TWO = 1 / 4
"""Of the steps of a worked text, the share that adds two digits."""
NOTICED = 2 / 3
"""After each step since a slip, how likely it is noticed; at the end it always is."""
STEP = re.compile(r"(!?)(\d\d)((?:[a-z]\d){1,2})=(\d\d)")


class FirstSlip(ExactMatch):
    """Reward of 1 for the right total after the ``#``, else 0; of a wrong text it says which step went wrong first.

    Its feedback, for the note `Feedback`, is that step as it should have been, ``"06b1=07"``: the first that does not
    follow from the digits and that no ``!`` goes back to; the answer, ``"#07"``, where all steps are right.
    """

    columns = ("prompt", "answer")

    def __init__(self) -> None:
        super().__init__(after="#")

    def feedback(self, completion: str, example: Example) -> str | None:
        if self(completion, example):
            return None
        items = str(example["prompt"]).rpartition("?")[2].removesuffix("=")
        chain = [*right_steps(items)]
        written: list[str] = []  # what stands in the end, step by step
        for step in completion.partition("#")[0].split():
            if (match := STEP.fullmatch(step)) is None:
                break
            mark, before, added, after = match.groups()
            if mark:
                written = [earlier for earlier in written if earlier[2] < added[0]]
            written.append(f"{before}{added}={after}")
        place = 0
        for step in written:
            one, two = chain[place], None if place + 1 == len(chain) else chain[place + 1]
            both = two and f"{one[:4]}{two[2:4]}={two[-2:]}"
            if step not in (one, both):
                return both if both and len(step) == len(both) else one
            place += 1 if step == one else 2
            if place == len(chain):
                break
        return chain[place] if place < len(chain) else f"#{example['answer']}"


def problems(
    count: int,
    fewest: int = 26,
    most: int = 26,
    slips: float = 0.0,
    hinted: dict[str, float] | None = None,
    seed: int = 0,
    held_out: bool = False,
) -> list[dict[str, str]]:
    """Draws `count` different problems, the same ones for the same arguments.

    A problem is held out or not by a hash of its digits (a fifth of all), so that the digits of a held-out problem are
    never those of a training problem, whatever the seeds.

    Args:
        count: rows.
        fewest: digits of a problem, at least 3, so that there are enough problems.
        most: digits of a problem, at most 26.
        slips: of the steps of a completion, the share that is one.
        hinted: of the prompts, the share that begins with a column and a `?`, by its name, such as ``{hint: 0.3}``: a
            model trained on some of them can later be its own teacher, shown what it will not have at test time.
        seed: of the draws.
        held_out: draw held-out problems.

    Returns rows of
        prompt: `"a6b1c1="`, digits with letters, from a on;
        answer: their sum modulo 100, `"08"`;
        solution: steps of the total so far, one digit or two with their letters, and the total then, and the answer
            after a `#`: `"00a6b1=07 07c1=08 #08"`;
        completion: the same on a way of its own, with slips and what undoes them;
        hint: each letter with the total after it, `"a06b07c08"`, true on every way;
        wrong_answer: one, not this, after a slip;
        correction: the step that had the slip, as it should have been, `"06b1=07"`;
        other_prompt: the prompt of another row, without what is shown; empty where there is no other.
    Raises ValueError for numbers of digits and columns that there are not, and for shares outside of [0, 1].
    """
    if not 3 <= fewest <= most <= len(ascii_lowercase):
        raise ValueError(f"totals.problems: 3 <= fewest <= most <= 26 digits, got fewest={fewest} and most={most}")
    hinted = hinted or {}
    for column in set(hinted) - set(COLUMNS):
        raise ValueError(f"totals.problems: there is no column {column!r} to show; there are {', '.join(COLUMNS)}")
    if not (0 <= slips < 1 and all(share >= 0 for share in hinted.values()) and sum(hinted.values()) <= 1):
        raise ValueError(f"totals.problems: shares must be in [0, 1], got slips={slips} and hinted={hinted}")
    draw = random.Random(seed)
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        digits = "".join(draw.choices("0123456789", k=draw.randint(fewest, most)))
        if is_held_out(digits) == held_out:
            drawn["".join(map("".join, zip(ascii_lowercase, digits, strict=False)))] = None
    items = [*drawn]
    others = [f"{other}=" if count > 1 else "" for other in items[1:] + items[:1]]
    # columns have draws of their own, so that the same problems come whatever is hinted and wherever it slips
    return [
        _row(one, other, slips, hinted, random.Random(f"{seed}/{one}"))
        for one, other in zip(items, others, strict=True)
    ]


def is_held_out(digits: str) -> bool:
    """Tells whether a problem of these digits belongs to the held-out fifth."""
    return zlib.crc32(digits.encode()) % 5 == 0


def worked(items: str, draw: random.Random, slips: float = 0.0) -> str:
    """Writes a way to the answer, step by step, with a share of slips among the steps.

    Of the slips about a third misreads a digit, the others are wrong sums. The steps after it build on it until it is
    noticed; then a `!` and the step as it should have been follow, and what comes after it is done again.

    Args:
        items: letters and digits, ``"a6b1c1"``.
        draw: of the way and of its slips.
        slips: the share of the steps.
    """
    letters, digits = items[::2], [int(digit) for digit in items[1::2]]
    steps, place, total = [], 0, 0
    slipped: tuple[int, int] | None = None  # the place and the total before the slip that was not noticed yet
    while place < len(digits) or slipped:
        mark = ""
        if slipped and (place == len(digits) or draw.random() < NOTICED):
            (place, total), slipped, mark = slipped, None, "!"
        after = place + (2 if draw.random() < TWO and place + 1 < len(digits) else 1)
        read, error = digits[place:after], 0
        if not slipped and draw.random() < slips:
            slipped = place, total
            if draw.random() < 1 / 3:
                read[draw.randrange(len(read))] += draw.randrange(1, 10)
            else:
                error = draw.choice([1, -1, 10, -10, draw.randrange(1, MODULUS)])
        read = [digit % 10 for digit in read]
        result = (total + sum(read) + error) % MODULUS
        added = "".join(f"{letter}{digit}" for letter, digit in zip(letters[place:after], read, strict=True))
        steps.append(f"{mark}{total:02d}{added}={result:02d}")
        place, total = after, result
    return " ".join([*steps, f"#{total:02d}"])


def right_steps(items: str) -> list[str]:
    """Writes the way to the answer digit by digit, without the answer: ``["00a6=06", "06b1=07"]`` of ``"a6b1"``."""
    steps, total = [], 0
    for letter, digit in zip(items[::2], items[1::2], strict=True):
        after = (total + int(digit)) % MODULUS
        steps.append(f"{total:02d}{letter}{digit}={after:02d}")
        total = after
    return steps


def _row(items: str, other: str, slips: float, hinted: dict[str, float], draw: random.Random) -> dict[str, str]:
    steps = right_steps(items)
    totals = [step[-2:] for step in steps]
    total = int(totals[-1])
    slip = draw.randrange(len(steps))
    row = {
        "prompt": f"{items}=",
        "answer": f"{total:02d}",
        "solution": worked(items, draw),
        "completion": worked(items, draw, slips),
        "hint": "".join(f"{letter}{after}" for letter, after in zip(items[::2], totals, strict=True)),
        "wrong_answer": f"{(total + draw.randrange(1, MODULUS)) % MODULUS:02d}",
        "correction": steps[slip],
        "other_prompt": other,
    }
    column = draw.choices([*hinted, ""], [*hinted.values(), 1 - sum(hinted.values())])[0]
    return row | {"prompt": f"{row[column]}?{row['prompt']}"} if column else row
