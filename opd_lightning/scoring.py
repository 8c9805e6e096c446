"""Calls of rewards: the time limit, the values that are accepted, and the handling of failures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn

from .endpoint import BudgetSpent
from .printable import printable, quoted
from .rows import given, location_of
from .time_limit import TooLate, within
from .trajectory import Example

LARGEST = torch.finfo(torch.float32).max


Answer = TypeVar("Answer")


class _Unusable(Exception):
    """Answer of a reward that is of no use, described."""


class RewardError(RuntimeError):
    """Failure of a reward; the message names it, the row and the completion."""


@dataclass
class Scoring:
    """Settings of calls of rewards.

    A reward answers with a finite number, or a bool (1 or 0), or None: it abstains. A row whose reward abstains counts
    in no mean: neither in its group's statistics nor in a term that reads rewards, its normalizer included, nor in
    what is logged of rewards and accuracy. ``train/abstained`` and ``val/abstained`` are the share of such rows.

    Args:
        timeout: seconds that a reward may take for one completion; None: no limit. Default 60. A reward that waits
            inside of a library which does not let go of Python ends when that does; outside of the main thread
            there is no limit.
        on_failure: handling of a reward that raises, takes longer, or answers with anything else: "stop" with an error
            that names reward, row and completion, or let it "abstain", with a warning at the first.

    Raises:
        ValueError: a timeout that is not positive and finite.
    """

    timeout: float | None = 60.0
    on_failure: Literal["stop", "abstain"] = "stop"

    def __post_init__(self) -> None:
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise ValueError(f"scoring.timeout is {self.timeout} s; it must be greater than 0, or null for no limit")
        if self.on_failure not in ("stop", "abstain"):
            raise ValueError(f"scoring.on_failure is {self.on_failure!r}; it must be 'stop' or 'abstain'")
        self._warned = False

    def __call__(self, reward: Callable[[Any, Example], Any], completion: Any, example: Example) -> float | None:
        """Returns the reward of a completion; None where it abstains.

        Raises:
            RewardError: the reward failed, and ``on_failure`` is "stop".
        """

        def number() -> float | None:
            answer = reward(completion, given(example))
            value = as_number(answer)
            if answer is not None and value is None:
                raise _Unusable(described(answer))
            return value

        return self._ask(number, reward, completion, example)

    @staticmethod
    def ahead(reward: Any, completions: Sequence[Any], examples: Sequence[Example]) -> None:
        """Tells a reward what it is about to be asked for, if it wants to know."""
        if hasattr(reward, "ahead"):
            reward.ahead(completions, [given(example) for example in examples])

    @staticmethod
    def record(reward: Any, name: str, record: Callable[[str, float], None]) -> None:
        """Records what a reward measured of its own work, if it does, as ``<name>/…``."""
        for what, value in (reward.measured() if hasattr(reward, "measured") else {}).items():
            record(f"{name}/{what}", value)

    def words(self, reward: Any, completion: Any, example: Example) -> str | None:
        """Returns what a reward says of a completion in words (`Reward.feedback`); None: nothing.

        Raises:
            RewardError: it failed, and ``on_failure`` is "stop".
        """

        def text() -> str | None:
            answer = reward.feedback(completion, given(example))
            if not isinstance(answer, str | None):
                raise _Unusable(f"{described(answer)} where words were asked for")
            return answer or None

        return self._ask(text, reward, completion, example)

    def _ask(self, call: Callable[[], Answer], reward: Any, completion: Any, example: Example) -> Answer | None:
        """Calls a reward within the time limit; None where it failed and that is no error."""
        # 1. the call
        cause = None
        try:
            # outside of the time limit: a worker's start takes longer than its answers
            if hasattr(reward, "prepare"):
                reward.prepare()
            return within(self.timeout if getattr(reward, "timed", True) else None, call)
        except BudgetSpent:
            raise
        except _Unusable as answer:
            failure = f"answered {answer}"
        except TooLate:
            failure = f"took more than {self.timeout:g} s (model.scoring.timeout)"
        except Exception as error:
            failure, cause = f"raised {type(error).__name__}: {printable(error)}", error
        # 2. what became of it, by reward, row and completion
        location = printable(location_of(example))
        row = f"{location}, whose" if location else "the row whose"
        message = (
            f"the reward {name_of(reward)} {failure}, for the completion {quoted(completion)} of {row} prompt is "
            f"{quoted(example.get('prompt'))}. A reward is a finite number, or None where it abstains"
        )
        # 3. stop or abstain
        if self.on_failure == "stop":
            raise RewardError(f"{message}; with model.scoring.on_failure: abstain such rows count nowhere") from cause
        if not self._warned:
            rank_zero_warn(f"{message}; it counts as abstained, as all later ones will (model.scoring.on_failure)")
        self._warned = True
        return None


def name_of(reward: Any) -> str:
    """Names a reward by its class, and by the function that it calls."""
    function: Any = getattr(reward, "function", None)
    name = f"{function.__module__}.{function.__qualname__}" if hasattr(function, "__qualname__") else ""
    return printable(f"{type(reward).__name__} ({name})" if name else type(reward).__name__)


def as_number(answer: Any) -> float | None:
    """Converts a reward's answer to a finite number in the range of float32; None if it is none."""
    if getattr(answer, "ndim", None) == 0 and hasattr(answer, "item"):  # a tensor or an array without dimensions
        answer = answer.item()
    if not isinstance(answer, Real | Decimal):
        return None
    try:
        value = float(answer)
    except (OverflowError, ValueError):
        return None
    # also False for NaN; beyond float32 it would be infinite among the other rewards
    return value if abs(value) <= LARGEST else None


def described(answer: Any) -> str:
    """Describes a reward's answer, for a message."""
    shape = getattr(answer, "shape", ())
    if len(shape):
        return f"a {type(answer).__name__} of shape {list(shape)}"
    return (
        quoted(answer) if isinstance(answer, Real | Decimal) else f"{quoted(answer)}, of type {type(answer).__name__}"
    )
