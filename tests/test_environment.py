"""Environments: episodes, limits, and what becomes of answers that fail, hang or are too long."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from opd_lightning.environment import Environment, Episode, Turn, limited, seed_of, side_by_side
from opd_lightning.rollout_settings import Rollout
from opd_lightning.time_limit import TooLate

LIMITS = Rollout(turn_timeout=0.3, observation_length=20)


class Counter(Environment):
    """Counts turns in its state, and does as it is told."""

    def reset(self, row: Any, seed: int) -> Any:
        if row["prompt"] == "broken":
            raise RuntimeError("no board")
        return {"turns": 0, "seed": seed}

    def step(self, state: Any, text: str) -> Any:
        state["turns"] += 1
        if text == "raise":
            raise KeyError("gone")
        if text == "exit":
            raise SystemExit(3)
        if text == "hang":
            time.sleep(30)
        if text == "much":
            return "x" * 100
        if text in ("none", "number"):
            return None if text == "none" else Turn("a", reward=float("nan"))
        return Turn(f"{state['turns']}", state, done=text == "done", reward=1.0)


def test_an_episode_is_its_state():
    episode = Episode(Counter(), {"prompt": "a"}, LIMITS)
    assert [episode.step("go").observation for _ in range(3)] == ["1", "2", "3"]
    assert not episode.over
    assert episode.step("done").reward == 1.0
    assert episode.over
    assert seed_of({"prompt": "a"}) == seed_of({"prompt": "a", "answer": 1}) != seed_of({"prompt": [{"role": "user"}]})


@pytest.mark.parametrize("where", ["main", "other"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise", "error: KeyError: 'go… [3 more characters]"),
        ("exit", "error: SystemExit: 3"),
        ("hang", "error: no answer wit… [9 more characters]"),
        ("none", "error: TypeError: st… [50 more characters]"),
        ("number", "error: ValueError: t… [33 more characters]"),
        ("much", "x" * 20 + "… [80 more characters]"),
    ],
)
def test_whatever_goes_wrong_is_an_observation_and_the_state_is_that_of_before(where, text, message, recwarn):
    episode = Episode(Counter(), {"prompt": "a"}, LIMITS)
    episode.step("go")
    before, start = threading.active_count(), time.monotonic()
    if where == "main":
        turn = episode.step(text)
    else:
        with ThreadPoolExecutor(1) as threads:
            turn = threads.submit(episode.step, text).result()
    assert time.monotonic() - start < 5
    assert turn.observation == message
    assert episode.failed == (text != "much")
    assert not episode.over
    assert episode.step("go").observation == "2", "as if nothing had been written"
    assert len([w for w in recwarn if "model.environment: Counter failed" in str(w.message)]) == (text != "much")
    assert threading.active_count() <= before + 1  # one that was interrupted may not have noticed yet


def test_an_episode_that_can_t_begin_ends_with_its_first_turn():
    episode = Episode(Counter(), {"prompt": "broken"}, Rollout())
    turn = episode.step("go")
    assert turn.observation == "error: RuntimeError: no board"
    assert episode.over
    assert episode.failed


def test_steps_are_taken_side_by_side_and_heard_in_their_order():
    """Four that wait for each other; the first to be asked is the last to answer."""
    barrier, done = threading.Barrier(4), [threading.Event() for _ in range(5)]
    done[4].set()

    def step(i: int) -> int:
        barrier.wait(timeout=20)
        assert done[i + 1].wait(timeout=20)
        done[i].set()
        return i

    assert side_by_side([lambda i=i: step(i) for i in range(4)], at_once=4) == [0, 1, 2, 3]
    assert side_by_side([threading.current_thread] * 3, at_once=1) == [threading.current_thread()] * 3


def test_a_loop_that_never_ends_is_left_in_a_thread_too():
    ended = threading.Event()

    def loop() -> None:
        try:
            while True:
                pass
        finally:
            ended.set()

    def late() -> bool:
        with pytest.raises(TooLate):
            limited(0.1, loop)
        return ended.wait(timeout=20)

    assert side_by_side([late, late], at_once=2) == [True, True]


def test_limits_are_checked():
    for settings in ({"turns": 0}, {"turn_timeout": 0.0}, {"observation_length": 0}):
        with pytest.raises(ValueError, match=rf"rollout\.{next(iter(settings))} must be >=? "):
            Rollout(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rollout\.turns=3: in this setting a rollout is one turn"):
        Rollout(turns=3).check(set(), set())
