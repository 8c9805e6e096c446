"""Environments: what answers to each turn of a policy, and what becomes of answers that fail, hang or are too long.

An environment reads text and writes text, or parts of which some are text. How these become steps, a setting decides.
"""

from __future__ import annotations

import ctypes
import json
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

from lightning.pytorch.utilities import rank_zero_warn

from .chat import Chat, is_chat
from .finite import Finite
from .printable import printable, quoted
from .rollout_settings import Rollout
from .rows import given, location_of
from .scoring import as_number
from .time_limit import TooLate, within
from .trajectory import Example

Result = TypeVar("Result")
_WARNING = threading.Lock()


@dataclass(frozen=True)
class Turn:
    """Answer of an environment to a turn of a policy.

    Attributes:
        observation: what the policy reads next: text, a list of parts (``{type: text, text: …}``, or of another type
            that the setting reads, such as ``{type: image, image: …}``), or messages ``{role, content}`` of these.
        state: of the episode from here on, in plain values: text, numbers, lists and dicts.
        done: whether the episode is over; then nobody reads the observation.
        reward: of this turn; None: none.
    """

    observation: str | list[Any] | Chat = ""
    state: Any = None
    done: bool = False
    reward: float | None = None


class Environment(Finite, ABC):
    """Environment in which policies act for several turns: what it knows of an episode is its state, and nothing else.

    So an episode can be begun anew from its row and seed at any time, as a resumed run does. What it raises, what takes
    longer than ``rollout.turn_timeout`` and what is longer than ``rollout.observation_length`` costs its trajectory a
    message, and never the run.
    """

    columns: tuple[str, ...] = ()
    """Columns that it reads."""
    shows: ClassVar[frozenset[str]] = frozenset()
    """Types of parts other than text that its observations always have; a setting that doesn't read them is refused."""
    rewards: ClassVar[bool] = False
    """Whether its turns have rewards: their sum is the trajectory's, where ``model.reward`` is not set."""
    role: str = "user"
    """Role of observations that are text, where prompts are chats."""
    options: Mapping[str, Any] = {}
    """Options that prompts are rendered with."""
    at_once: int = 8
    """Episodes that are begun or stepped at the same time, each in a thread; 1 where steps share what threads can't."""
    _warned = False

    def reset(self, row: Example, seed: int) -> Any:
        """Begins an episode, whose first observation is the row's prompt; returns its state (default: None).

        Args:
            row: as the policy reads it.
            seed: of the row, the same for all rollouts of it.
        """
        return None

    @abstractmethod
    def step(self, state: Any, text: str) -> Turn | str:
        """Answers to what a policy wrote in a turn; text alone is an observation, and the state stays.

        Args:
            state: of the episode, a copy.
            text: without the token that ended the turn.
        """

    def close(self) -> None:
        """Releases resources outside of this process; `step` may be called again afterwards."""


class Episode:
    """Way of one trajectory through an environment.

    Args:
        environment: answers.
        row: whose episode it is.
        rollout: has the limits.
        reads: types of parts other than text that the setting reads.

    Attributes:
        over: whether it has ended.
        failed: whether the environment did not answer the last turn.
    """

    def __init__(
        self, environment: Environment, row: Example, rollout: Rollout, reads: Container[str] = frozenset()
    ) -> None:
        self._environment, self._row, self._rollout, self._reads = environment, row, rollout, reads
        self._state: Any = None
        self.over = self.failed = False
        self._broken = self._try(lambda: environment.reset(given(row), seed_of(row)))

    @classmethod
    def begun(
        cls,
        environment: Environment,
        row: Example,
        texts: Sequence[str],
        rollout: Rollout,
        reads: Container[str] = frozenset(),
    ) -> Episode:
        """Begins an episode and answers to turns that were recorded, until it is over."""
        episode = cls(environment, row, rollout, reads)
        for text in texts:
            if not episode.over:
                episode.step(text)
        return episode

    def step(self, text: str) -> Turn:
        """Answers to a turn; where the environment fails, by what went wrong."""
        if self._broken is not None:  # it never began
            self.over = self.failed = True
            return Turn(self._broken, done=True)
        turn: Any = None

        def call() -> Any:
            nonlocal turn
            turn = checked(self._environment.step(deepcopy(self._state), text), self._state, self._reads)
            return turn.state

        failure = self._try(call)
        self.failed = failure is not None
        if failure is not None:
            return Turn(failure)
        self.over = turn.done
        return replace(turn, observation=cut(turn.observation, self._rollout.observation_length))

    def _try(self, call: Callable[[], Any]) -> str | None:
        """Takes over the state that a call returns; returns what the policy is told where there is none."""
        try:
            self._state = deepcopy(limited(self._rollout.turn_timeout, call))
            return None
        except TooLate:
            reason = f"no answer within {self._rollout.turn_timeout:g} s"
        except (Exception, SystemExit) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
        self.warn(reason)
        return cut(f"error: {reason}", self._rollout.observation_length)

    def end(self, error: Exception) -> None:
        """Ends the episode where its observation can't be read."""
        self.over = self.failed = True
        self.warn(f"{type(error).__name__}: {error}")

    def warn(self, reason: str) -> None:
        """Warns of the first failure of the environment."""
        with _WARNING:
            first, self._environment._warned = not self._environment._warned, True
        if first:
            place = location_of(self._row)
            rank_zero_warn(
                f"model.environment: {type(self._environment).__name__} failed{f' at {place}' if place else ''}: "
                f"{printable(reason)}. The policy reads that as the observation, here and later, or the episode ends; "
                "the run goes on, and train/failures counts them"
            )


def seed_of(row: Example) -> int:
    """Derives the seed of a row's episodes from its prompt."""
    return zlib.crc32(json.dumps(row.get("prompt"), sort_keys=True, default=str).encode())


def checked(turn: Any, state: Any, reads: Container[str] = frozenset()) -> Turn:
    """Checks what `Environment.step` returned; ``state``: of text alone, ``reads``: as in `Episode`.

    Raises:
        TypeError: it is neither a turn nor text, or its observation is neither text nor messages of what is read.
        ValueError: its reward is no finite number.
    """
    if isinstance(turn, str):
        return Turn(turn, state)
    if not isinstance(turn, Turn):
        raise TypeError(f"step returned {quoted(turn)}, which is neither a Turn nor text")
    chat: Any = turn.observation
    for part in [part for m in chat for part in _parts(m.get("content"))] if is_chat(chat) else _parts(chat):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is None or (kind == "text" and not isinstance(part.get("text"), str)):
            raise TypeError(f"the observation {quoted(turn.observation)} is neither text nor messages of text")
        if kind != "text" and kind not in reads:
            raise TypeError(f"the observation holds a part of the type {quoted(kind)}, which is not read here")
    reward = None if turn.reward is None else as_number(turn.reward)
    if turn.reward is not None and reward is None:
        raise ValueError(f"the reward {quoted(turn.reward)} is no finite number")
    return replace(turn, reward=reward)


def _parts(content: Any) -> list[Any]:
    """Lists the parts of a content, one of text where it is none of several."""
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def cut(observation: Any, length: int) -> Any:
    """Cuts the texts of an observation behind ``length`` characters, and says how many are left out."""
    if isinstance(observation, list):
        return [cut(item, length) for item in observation]
    if isinstance(observation, dict):  # a message, or a part of one
        return {key: cut(value, length) if key in ("content", "text") else value for key, value in observation.items()}
    beyond = len(observation) - length if isinstance(observation, str) else 0
    return observation if beyond <= 0 else f"{observation[:length]}… [{beyond} more characters]"


def limited(seconds: float, call: Callable[[], Any]) -> Any:
    """Returns a call's result within a time limit.

    A call that is late is interrupted, once; what it waits for outside of Python goes on until that returns.

    Raises:
        TooLate: it is late.
        Exception: what the call raised.
    """
    if threading.current_thread() is threading.main_thread():
        return within(seconds, call)
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except TooLate:
            pass
        except (Exception, SystemExit) as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="environment", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        # no other way ends a loop in a thread, which would slow the run down for good
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TooLate))
        raise TooLate
    return results[0]


class Answering:
    """Lets an environment answer turns while others are written, ``at_once`` of them at a time; a context manager.

    With one at a time, answers are made when they are asked for, in the thread that asks.
    """

    def __init__(self, at_once: int) -> None:
        self._pool = ThreadPoolExecutor(at_once, "environments") if at_once > 1 else None
        self._answers: dict[int, Callable[[], Turn]] = {}

    def begin(self, row: int, episode: Episode, text: str) -> None:
        """Begins to answer a row's turn, unless it has begun."""
        if row not in self._answers:
            step = partial(episode.step, text)
            self._answers[row] = self._pool.submit(step).result if self._pool is not None else step

    def end(self, row: int) -> Turn:
        """Waits for the answer to a row's turn."""
        return self._answers.pop(row)()

    def __enter__(self) -> Answering:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def side_by_side(calls: Sequence[Callable[[], Result]], at_once: int) -> list[Result]:
    """Makes calls in threads, ``at_once`` of them at a time; returns the results in the order of the calls."""
    if at_once == 1 or len(calls) < 2:
        return [call() for call in calls]
    with ThreadPoolExecutor(min(at_once, len(calls)), "environments") as pool:
        return list(pool.map(lambda call: call(), calls))
