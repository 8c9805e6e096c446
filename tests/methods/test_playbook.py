"""RESD's playbook, by what scripted reflections and lessons say: what it learns, forgets, and shows."""

from __future__ import annotations

import io
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opd_lightning.methods.playbook import Playbook
from opd_lightning.note import Note, memories, remember
from opd_lightning.trajectory import Trajectories
from tests.objective.reference import batch


class Said(Note):
    """What a script says of each rollout that failed (or of each that did not); it keeps what it was shown."""

    columns = ("playbook", "attempt", "feedback")

    def __init__(self, column: str, script: Any, about: float = 0.0) -> None:
        self.writes, self.script, self.about = (column,), script, about
        self.seen: list[list[str]] = []

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        self.seen.append([entry["text"] for entry in trajectories.examples[0]["playbook"]])
        texts = [
            self.script(row) if reward == self.about else None
            for row, reward in zip(trajectories.examples, trajectories.reward.tolist(), strict=True)
        ]
        return trajectories.noted({self.writes[0]: texts})


def rolled(texts: list[str], reward: list[float], rows: list[int] | None = None) -> Trajectories:
    count = len(texts)
    plain = batch([[1, 1]] * count, 5, examples=[{"text": text} for text in texts], reward=torch.tensor(reward))
    return replace(plain, row=torch.tensor(rows or list(range(count))))


def world(everyone: Any = lambda value: [value]) -> SimpleNamespace:
    return SimpleNamespace(
        completions=lambda trajectories: [row["text"] for row in trajectories.examples],
        ranks=SimpleNamespace(gather_objects=everyone),
        record=lambda *values: None,
        has_rewards=True,
    )


def numbers(playbook: Playbook) -> list[int]:
    return [entry["number"] for entry in playbook.entries]


def test_lessons_of_failures_become_entries_and_are_shown_from_then_on():
    reflection, lesson = Said("reflection", lambda row: f"{row['text']} failed"), Said("lesson", lambda row: "a\n\n b ")
    playbook = Playbook(reflection, lesson)
    noted = playbook(world(), rolled(["x", "", "y"], [0.0, 1.0, 0.0]))
    assert [row["reflection"] for row in noted.examples] == ["x failed", None, "y failed"]
    assert [row["attempt"] for row in noted.examples] == ["x", " ", "y"], "an empty column would hide the view"
    shown = [[entry["text"] for entry in row["playbook"]] for row in noted.examples]
    assert shown == [["a", "b", "a", "b"]] * 3
    assert numbers(playbook) == [1, 2, 3, 4]
    playbook(world(), rolled(["z"], [0.0]))
    assert reflection.seen == [[], ["a", "b", "a", "b"]]
    assert set(playbook.writes) == {"playbook", "attempt", "solved", "reflection", "lesson"}
    assert playbook.columns == ("feedback",), "what it writes itself is no column of the data set"
    assert [len(row["playbook"]) for row in noted.examples] == [4] * 3, "what was noted stays as it was"


def test_entries_that_do_harm_leave_and_those_of_no_use():
    says = {1: "[1] Harmful, [2] helpful [9] helpful", 2: "[2]: helpful; [4] harmful", 3: "[4] helpful"}
    step = {"now": 0}
    reflection = Said("reflection", lambda row: says.get(step["now"]))
    praise = Said("praise", lambda row: "[3] helpful", about=1.0)
    lesson = Said("lesson", lambda row: {0: "one\ntwo\nthree", 1: "four\nfive"}.get(step["now"], ""))
    playbook = Playbook(reflection, lesson, success=praise, every=4)
    for now in range(4):
        step["now"] = now
        playbook(world(), rolled(["x", "y"], [0.0, 1.0 if now == 2 else torch.nan]))
    assert numbers(playbook) == [1, 2, 3, 4, 5]
    counts = [(entry["helpful"], entry["harmful"], entry["used"]) for entry in playbook.entries]
    assert counts == [(0, 1, 1), (2, 0, 2), (1, 0, 2), (1, 1, 3), (0, 0, 1)]
    step["now"] = 4
    playbook(world(), rolled(["x"], [0.0]))
    assert numbers(playbook) == [2, 3], "1 did harm, 4 as much as good, 5 was of no use for three batches"


def test_beyond_the_most_those_leave_that_were_not_used_for_longest():
    step = {"now": 0}
    lesson = Said("lesson", lambda row: f"lesson {step['now']}")
    playbook = Playbook(Said("reflection", lambda row: "[1] helpful"), lesson, most=2, every=100)
    for now in range(3):
        step["now"] = now
        playbook(world(), rolled(["x"], [0.0]))
    assert numbers(playbook) == [1, 3], "the first is used again and again"
    with pytest.raises(ValueError, match="most and every must be >= 1, got 0 and 4"):
        Playbook(lesson, lesson, most=0)
    with pytest.raises(ValueError, match="Playbook tells failures by the reward, and there is none"):
        playbook.check(SimpleNamespace(has_rewards=False))


def test_right_completions_are_remembered_by_row():
    silent = Said("reflection", lambda row: None), Said("lesson", lambda row: None)
    playbook = Playbook(*silent)
    first = playbook(world(), rolled(["x", "y", "z"], [0.0, 1.0, 1.0], rows=[7, 7, 8]))
    assert [row["solved"] for row in first.examples] == ["y", "y", "z"], "a peer's, or its own"
    later = playbook(world(), rolled(["p", "q", "r"], [0.0, 0.0, 1.0], rows=[7, 9, 8]))
    assert [row["solved"] for row in later.examples] == ["y", None, "r"]
    assert playbook.solutions == {7: "y", 8: "r"}


def test_memory_survives_a_checkpoint_byte_for_byte():
    def made() -> Playbook:
        return Playbook(Said("reflection", lambda row: "[1] helpful"), Said("lesson", lambda row: row["text"]))

    before, after = made(), made()
    for now in range(3):
        before(world(), rolled([f"x{now}", "y"], [0.0, 1.0]))
    saved = io.BytesIO()
    torch.save(memories({"p": before}), saved)
    saved.seek(0)
    remember({"p": after}, torch.load(saved, weights_only=True))
    for playbook in (before, after):
        playbook(world(), rolled(["x3", "y3"], [0.0, 0.0]))
    assert repr(before.state_dict()) == repr(after.state_dict())
    assert before.solutions == {1: "y"}


def test_it_is_the_same_on_two_ranks_as_on_one():
    def made() -> Playbook:
        says = Said("reflection", lambda row: f"[{len(row['text'])}] helpful"), Said("lesson", lambda row: row["text"])
        return Playbook(*says, most=4)

    def rollouts(now: int) -> Trajectories:
        return rolled([f"{'x' * i}{now}" for i in range(6)], [0.0, 1.0, 0.0, 0.0, 1.0, 0.0])

    alone, both = made(), [made(), made()]
    for now in range(6):
        alone(world(), rollouts(now))
    barrier, given = threading.Barrier(2, timeout=20), [None, None]

    def run(rank: int) -> None:
        def everyone(value: Any) -> list[Any]:
            given[rank] = value
            barrier.wait()
            joined = [*given]
            barrier.wait()
            return joined

        for now in range(6):
            both[rank](world(everyone), rollouts(now).select(torch.arange(3) + 3 * rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [repr(playbook.state_dict()) for playbook in both] == [repr(alone.state_dict())] * 2
    assert alone.entries
