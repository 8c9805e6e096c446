"""Environments of other packages: Gymnasium's with texts or discrete actions, and OpenEnv's, in this process."""

from __future__ import annotations

import importlib
import threading
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from ...environment import Environment, Turn
from ...imported import import_callable
from ...trajectory import Example

KEPT = 256
"""States in which objects of episodes wait for their next turn."""
_LOCK = threading.Lock()


class Replayed(Environment):
    """Environment whose episodes are objects that keep their state to themselves.

    What is known of an episode is its row's seed and what was written; its object waits for the next turn. Where that
    is gone (another rollout took it, or a run was resumed), one is made anew and all turns are repeated, which has to
    lead to the same place.

    Attributes:
        seed_column: the column with the seed of a row's episodes.
    """

    seed_column = "seed"
    columns = (seed_column,)
    rewards = True

    @abstractmethod
    def make(self, seed: int) -> Any:
        """Makes an episode's object and begins it."""

    @abstractmethod
    def act(self, live: Any, text: str) -> Turn:
        """Has an object take a turn; the state of the `Turn` is not read."""

    def end(self, live: Any) -> None:
        """Releases an object."""

    def reset(self, row: Example, seed: int) -> Any:
        return {"seed": int(row[self.seed_column]), "texts": []}

    def step(self, state: Any, text: str) -> Turn:
        live = self._taken(state)
        turn = self.act(live, text)
        later = {"seed": state["seed"], "texts": [*state["texts"], text]}
        if turn.done:
            self.end(live)
        else:
            self._keep(later, live)
        return Turn(turn.observation, later, turn.done, turn.reward)

    def _taken(self, state: Any) -> Any:
        """Takes the object that waits in a state, or repeats what led there."""
        with _LOCK:
            waiting = self._waiting.pop(_key(state), [])
            if waiting[1:]:
                self._waiting[_key(state)] = waiting[1:]
        if waiting:
            return waiting[0]
        live = self.make(state["seed"])
        for text in state["texts"]:
            self.act(live, text)
        return live

    def _keep(self, state: Any, live: Any) -> None:
        """Has an object wait; beyond `KEPT` states the one that has waited for longest is released."""
        with _LOCK:
            self._waiting.setdefault(_key(state), []).append(live)
            oldest = self._waiting.pop(next(iter(self._waiting))) if len(self._waiting) > KEPT else []
        for other in oldest:
            self.end(other)

    @property
    def _waiting(self) -> dict[Any, list[Any]]:
        held: dict[Any, list[Any]] = vars(self).setdefault("_objects", {})
        return held

    def close(self) -> None:
        for live in [live for waiting in self._waiting.values() for live in waiting]:
            self.end(live)
        self._waiting.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_objects"}


def _key(state: Any) -> tuple[Any, ...]:
    return (state["seed"], *state["texts"])


class Gymnasium(Replayed):
    """Environment of Gymnasium, with actions that are texts or a few that have names.

    Observations are what it renders with ``render_mode="ansi"``, where it does, or else its observations as texts.
    `gymnasium_rows` makes rows of it: ``data.train: python:opd_lightning.modalities.autoregressive.gymnasium_rows``.

    Args:
        id: as in ``gymnasium.make``.
        settings: for the same.
        actions: words for its discrete actions, in their order. Default: their numbers. What is none of them is
            answered by an error, and is no step.

    Raises:
        ImportError: gymnasium is not installed.
        ValueError: its actions are neither texts nor discrete, or other than ``actions`` many.
    """

    def __init__(self, id: str, settings: dict[str, Any] | None = None, actions: list[str] | None = None) -> None:
        self.id, self.settings, self.actions = id, settings or {}, actions
        game = self._made()
        kind, count = type(game.action_space).__name__, int(getattr(game.action_space, "n", 0))
        game.close()
        if kind not in ("Text", "Discrete") or (kind == "Text" and actions):
            raise ValueError(f"Gymnasium: the actions of {id} are of the kind {kind}; Text (without names) or Discrete")
        if actions is not None and len(actions) != count:
            raise ValueError(f"Gymnasium.actions: {id} has {count} actions, there are {len(actions)} names")
        self._words = None if kind == "Text" else actions or [str(number) for number in range(count)]

    def _made(self) -> Any:
        try:
            gymnasium = importlib.import_module("gymnasium")
        except ImportError as error:
            raise ImportError("Gymnasium needs a package: pip install gymnasium") from error
        return gymnasium.make(self.id, **self.settings)

    def make(self, seed: int) -> Any:
        game = self._made()
        game.reset(seed=seed)
        return game

    def act(self, live: Any, text: str) -> Turn:
        action: Any = text
        if self._words is not None:
            if (word := text.strip().lower()) not in (words := [word.lower() for word in self._words]):
                return Turn(f"error: an action is one of {', '.join(self._words)}", reward=0.0)
            action = live.action_space.start + words.index(word)
        observation, reward, terminated, truncated, _ = live.step(action)
        return Turn(self.seen(live, observation), done=bool(terminated or truncated), reward=float(reward))

    def seen(self, live: Any, observation: Any) -> str:
        """Writes what a policy reads of an observation."""
        return str(live.render() if live.render_mode == "ansi" else observation)

    def end(self, live: Any) -> None:
        live.close()


def gymnasium_rows(
    id: str, count: int, settings: dict[str, Any] | None = None, before: str = "", first: int = 0
) -> list[dict[str, Any]]:
    """Makes rows for `Gymnasium`: the first observation of ``count`` episodes, behind the words ``before``.

    The seeds are those from ``first`` on, in the column ``seed``.
    """
    environment, rows = Gymnasium(id, settings), []
    for seed in range(first, first + count):
        game = environment._made()
        observation, _ = game.reset(seed=seed)
        rows.append({"prompt": f"{before}{environment.seen(game, observation)}", "seed": seed})
        game.close()
    return rows


class OpenEnv(Replayed):
    """Environment of OpenEnv, in this process: its own class, without a server.

    Args:
        environment: dotted path of the subclass of its ``Environment``.
        action: dotted path of the class of its actions.
        writes: the field of an action that takes what was written. Default ``message``.
        reads: the fields of an observation that are read, one below the other. Default: all but done, reward and
            metadata, as JSON.

    Raises:
        ValueError: a path that can't be imported.
    """

    def __init__(self, environment: str, action: str, writes: str = "message", reads: Sequence[str] = ()) -> None:
        self.environment, self.action, self.writes, self.reads = environment, action, writes, list(reads)
        self._make, self._act = (
            import_callable(path, f"OpenEnv.{key}") for key, path in (("environment", environment), ("action", action))
        )

    def make(self, seed: int) -> Any:
        live = self._make()
        live.reset(seed=seed)
        return live

    def act(self, live: Any, text: str) -> Turn:
        observation = live.step(self._act(**{self.writes: text}))
        reward = None if observation.reward is None else float(observation.reward)
        return Turn(self.seen(observation), done=bool(observation.done), reward=reward)

    def seen(self, observation: Any) -> str:
        """Writes what a policy reads of an observation."""
        if self.reads:
            return "\n".join(str(getattr(observation, name)) for name in self.reads)
        return str(observation.model_dump_json(exclude={"done", "reward", "metadata"}))

    def end(self, live: Any) -> None:
        live.close()
