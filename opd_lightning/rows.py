"""Rows with their locations: an error that a row causes names the row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn

from .printable import printable
from .trajectory import Example

Method = TypeVar("Method", bound=Callable[..., Any])

LOCATION = "__location__"
"""Column with the place where a row was read ("train.jsonl, row 17"); views and rewards never see it."""

TOO_LONG = "__too_long__"
"""Column with the names of the teachers whose prompts notes made longer than they can read."""

STAND_IN = "__stand_in__"
"""Marks padding examples, which keep ranks in step; they count nowhere."""


class BrokenPart(TypeError):
    """Failure of a part of the run, whatever the row."""


# Errors that no row causes: of the run's parts, the machine, the installation, and signals that end the run
_NOT_OF_A_ROW = (
    BrokenPart,
    MemoryError,
    torch.OutOfMemoryError,
    ImportError,
    KeyboardInterrupt,
    SystemExit,
    GeneratorExit,
)


class Row(dict[str, Any]):
    """Example with the place where it was read and its number in its data set, from 0."""

    location: str = ""
    index: int | None = None

    def to(self, *_: Any, **__: Any) -> Row:
        """Returns itself: Lightning moves batches to the device, and would build new mappings without locations."""
        return self

    def __or__(self, more: Any) -> Row:  # type: ignore[override]
        """Adds columns to a copy; location and index stay."""
        row = Row({**self, **more})
        row.location, row.index = self.location, self.index
        return row


def row_of(examples: Sequence[Example], index: int) -> Row:
    """Copies one of the examples, with its location: its own, that of ``examples.locations``, or its number."""
    example = examples[index]
    if isinstance(example, Row):
        return example | {}
    row, located = Row(example), getattr(examples, "locations", None)
    row.location, row.index = located[index] if located else f"row {index + 1}", index
    return row


def given(example: Example) -> Example:
    """Copies an example for views and rewards, which may change columns, lists and mappings; tensors are shared."""
    return example | {name: _unshared(value) for name, value in example.items()}


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def identified(example: Example) -> dict[str, Any]:
    """Collects number, location and answer of an example, where it has them, to identify it in files and logs."""
    identity = {"index": getattr(example, "index", None), "location": location_of(example) or None}
    return {name: value for name, value in (identity | {"answer": example.get("answer")}).items() if value is not None}


def location_of(example: Example) -> str:
    """Returns the place where an example was read; empty where that is unknown."""
    return getattr(example, "location", "")


def reason_of(error: BaseException) -> str:
    """Formats an error in one line, with its class unless that is `ValueError`.

    Raises:
        BaseException: the error itself, where no row causes such.
    """
    if isinstance(error, _NOT_OF_A_ROW):
        raise error
    text = printable(" ".join(str(error).split()))
    if isinstance(error, ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


SAID, SAID_OF_A_KIND = 10, 2
"""Bad rows whose reasons are kept, of all and of one kind of reason; further ones are counted."""


class BadRows:
    """Collector of rows that can't be used: the first raises, or all are counted.

    Args:
        key: the setting that holds their source, such as "data.train", for the messages.
        policy: "refuse", "skip", or "tell": skipped without a warning, for who tells what a run will refuse.

    Attributes:
        kinds: how many there are, by kind of reason.
        said: where the first ones are, with the reasons.
    """

    def __init__(self, key: str, policy: str) -> None:
        self.key, self.policy = key, policy
        self.kinds: Counter[str] = Counter()
        self.said: list[str] = []

    @property
    def first(self) -> str:
        """Returns where the first is, and its reason; empty where there is none."""
        return self.said[0] if self.said else ""

    def __call__(self, location: str, reason: str, cause: BaseException | None = None) -> None:
        """Refuses or counts a bad row.

        Raises:
            ValueError: bad rows are refused; the message names the row.
        """
        if self.policy == "refuse":
            raise ValueError(
                f"{location}: {reason}. Correct the row, or leave such rows out: data.on_bad_row: skip"
            ) from cause
        kind = re.sub(r"\d+", "N", reason.split(": ")[0])
        if self.kinds[kind] < SAID_OF_A_KIND and len(self.said) < SAID:
            self.said.append(f"{location}: {reason}")
        self.kinds[kind] += 1

    @contextmanager
    def at(self, location: str) -> Iterator[None]:
        """Blames errors that are raised within on the row at ``location``."""
        try:
            yield
        except BaseException as error:  # a tokenizer that panics raises no Exception
            self(location, reason_of(error), error)

    def warn(self) -> None:
        if self.kinds and self.policy == "skip":
            kinds = ", ".join(f"{count} × {kind}" for kind, count in self.kinds.most_common())
            message = f"{self.key}: {self.kinds.total()} rows are skipped: {kinds}. The first is {self.first}"
            rank_zero_warn(printable(message))


class LostRow(ValueError):
    """Failure of a row that could be used when the run began."""


def blames_rows(method: Method) -> Method:
    """Decorates methods that take examples or trajectories: their errors name the row that caused them.

    The methods are a setting's, or of an object that has a ``setting``.

    Raises:
        LostRow: one of the examples can no longer be used, as the setting's `refusal` finds: its image has vanished,
            or its template reads the clock. Its cause is the error that was raised.
    """

    @wraps(method)
    def blaming(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except LostRow:
            raise
        except Exception as error:
            batch: Any = next((getattr(a, "trajectories", a) for a in args if not isinstance(a, str)), [])
            for example in batch if isinstance(batch, list) else batch.examples:
                if (reason := _refusal(getattr(self, "setting", self), example)) is not None:
                    lost = f"{location_of(example) or 'a row'} was fine when the run began, and is no longer: {reason}"
                    raise LostRow(printable(lost)) from error
            raise

    return cast(Method, blaming)


def _refusal(setting: Any, example: Example) -> str | None:
    try:
        return cast("str | None", setting.refusal(example))
    except Exception as error:
        return reason_of(error)
