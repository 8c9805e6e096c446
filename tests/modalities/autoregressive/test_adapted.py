"""Environments of other packages, the real ones: their episodes, and that those are seeds and turns."""

from __future__ import annotations

import builtins
import importlib
import pickle
from typing import Any

import pytest

from opd_lightning.environment import Episode, Turn
from opd_lightning.modalities.autoregressive import Gymnasium, OpenEnv, adapted, gymnasium_rows
from opd_lightning.rollout_settings import Rollout

LAKE: dict[str, Any] = {"render_mode": "ansi", "is_slippery": False}
WAYS = ["left", "down", "right", "up"]
TO_THE_GOAL = ["down", "down", "right", "right", "down", "right"]


def play(environment: Any, row: dict[str, Any], *texts: str) -> list[Turn]:
    episode = Episode(environment, row, Rollout())
    return [episode.step(text) for text in texts]


@pytest.fixture
def lake() -> Any:
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    return Gymnasium("FrozenLake-v1", LAKE, WAYS)


def test_words_are_actions_and_a_goal_is_worth_one(lake):
    turns = play(lake, {"seed": 3}, *TO_THE_GOAL)
    assert [turn.reward for turn in turns] == [0, 0, 0, 0, 0, 1]
    assert [turn.done for turn in turns] == [False] * 5 + [True]
    assert "FFF" in turns[0].observation
    (wrong,) = play(lake, {"seed": 3}, "jump")
    assert wrong.observation == "error: an action is one of left, down, right, up"
    assert not wrong.done


def test_an_episode_is_its_seed_and_its_turns(lake, monkeypatch):
    """Two of the same row and turns have objects of their own; what is gone is made again."""
    first, second = (Episode(lake, {"seed": 1}, Rollout()) for _ in range(2))
    made = []
    make = type(lake).make
    monkeypatch.setattr(type(lake), "make", lambda self, seed: made.append(seed) or make(self, seed))
    for text in TO_THE_GOAL[:3]:
        assert first.step(text) == second.step(text)
    assert made == [1, 1]
    lake.close()
    assert [first.step(text).reward for text in TO_THE_GOAL[3:]] == [0, 0, 1]
    assert made == [1, 1, 1]
    other = pickle.loads(pickle.dumps(lake))
    assert play(other, {"seed": 1}, *TO_THE_GOAL)[-1].reward == 1


def test_objects_that_wait_for_long_are_released(lake, monkeypatch):
    monkeypatch.setattr(adapted, "KEPT", 3)
    ended = []
    monkeypatch.setattr(type(lake), "end", lambda self, live: ended.append(live))
    for seed in range(5):
        play(lake, {"seed": seed}, "down")
    assert len(ended) == 2


def test_rows_are_the_first_observations(lake):
    rows = gymnasium_rows("FrozenLake-v1", 2, LAKE, before="Go.\n", first=5)
    assert [row["seed"] for row in rows] == [5, 6]
    assert all(row["prompt"].startswith("Go.\n") and "G" in row["prompt"] for row in rows)


def test_texts_are_actions():
    gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed")

    class Parrot(gymnasium.Env):
        action_space = observation_space = gymnasium.spaces.Text(100)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return "say something", {}

        def step(self, action):
            return action[::-1], 0.5, action == "stop", False, {}

    gymnasium.register("Parrot-v0", entry_point=Parrot, disable_env_checker=True, order_enforce=False)
    turns = play(Gymnasium("Parrot-v0"), {"seed": 0}, "abc", "stop")
    assert [(turn.observation, turn.done, turn.reward) for turn in turns] == [("cba", False, 0.5), ("pots", True, 0.5)]
    assert gymnasium_rows("Parrot-v0", 1)[0] == {"prompt": "say something", "seed": 0}


@pytest.mark.parametrize(
    ("id_", "actions", "message"),
    [("FrozenLake-v1", ["left"], r"has 4 actions, there are 1 names"), ("Pendulum-v1", None, r"are of the kind Box")],
)
def test_other_actions_are_refused(id_, actions, message, lake):
    with pytest.raises(ValueError, match=message):
        Gymnasium(id_, actions=actions)


def test_a_missing_package_is_named(monkeypatch):
    imported = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "gymnasium":
            raise ModuleNotFoundError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(importlib, "import_module", lambda name: missing(name))
    with pytest.raises(ImportError, match=r"Gymnasium needs a package: pip install gymnasium"):
        Gymnasium("FrozenLake-v1")


def test_openenv_runs_here(tmp_path, monkeypatch):
    pytest.importorskip("openenv", reason="openenv-core is not installed")
    (tmp_path / "guessing.py").write_text(GUESSING, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    environment = OpenEnv("guessing.Guessing", "guessing.Guess", writes="number", reads=["hint"])
    turns = play(environment, {"seed": 7}, "3", "9", "7")
    assert [(turn.observation, turn.done, turn.reward) for turn in turns] == [
        ("more", False, 0.0),
        ("less", False, 0.0),
        ("right", True, 1.0),
    ]
    (failed,) = play(environment, {"seed": 7}, "seven")
    assert failed.observation.startswith("error: ValidationError")
    assert (
        play(OpenEnv("guessing.Guessing", "guessing.Guess", "number"), {"seed": 1}, "0")[0].observation
        == '{"hint":"more"}'
    )


GUESSING = """
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Guess(Action):
    number: int


class Hint(Observation):
    hint: str = ""


class Guessing(Environment):
    def reset(self, seed=None, episode_id=None, **kwargs):
        self.number = seed
        return Hint(hint="guess")

    def step(self, action, timeout_s=None, **kwargs):
        right = action.number == self.number
        hint = "right" if right else "more" if action.number < self.number else "less"
        return Hint(hint=hint, done=right, reward=float(right))

    @property
    def state(self):
        return State()
"""
