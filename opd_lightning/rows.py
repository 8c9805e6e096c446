"""Rows and where they were read: whatever a row raises is that row's fault, and names it."""

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
"""The column that says where a row was read ("train.jsonl, row 17"); it is dropped before anybody sees the examples."""

STAND_IN = "__stand_in__"
"""A column that only examples have which are there to keep a rank busy; they count nowhere."""


class BrokenPart(TypeError):
    """A part of the run is of no use, whatever the row."""


# What no row can help: the run's parts, the machine, the installation, and whoever ends the run
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
    """An example that knows where it was read, and its number in its data set, from 0."""

    location: str = ""
    index: int | None = None

    def to(self, *_: Any, **__: Any) -> Row:
        """Itself: Lightning moves what it hands over to the device, and would make new mappings without locations."""
        return self

    def __or__(self, more: Any) -> Row:  # type: ignore[override]
        """With further columns."""
        row = Row({**self, **more})
        row.location, row.index = self.location, self.index
        return row


def row_of(examples: Sequence[Example], index: int) -> Row:
    """A copy of one of the examples, with its location: its own, that which ``examples.locations`` has for it, or its
    number."""
    found = examples[index]
    if isinstance(found, Row):
        return found | {}
    row, located = Row(found), getattr(examples, "locations", None)
    row.location, row.index = located[index] if located else f"row {index + 1}", index
    return row


def given(example: Example) -> Example:
    """A copy for views and rewards: they may change its columns, lists and mappings; images and tensors are shared."""
    return example | {name: _unshared(value) for name, value in example.items()}


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value


def identified(example: Example) -> dict[str, Any]:
    """What tells an example from others in what is written of it: number, location and answer, where it has them."""
    known = {"index": getattr(example, "index", None), "location": location_of(example) or None}
    return {name: value for name, value in (known | {"answer": example.get("answer")}).items() if value is not None}


def location_of(example: Example) -> str:
    """Where an example was read; empty where it does not know."""
    return getattr(example, "location", "")


def reason_of(error: BaseException) -> str:
    """What an error says in one line, after its kind where that is more than "a value is wrong".

    Raises:
        BaseException: the error itself, where it is no row's fault.
    """
    if isinstance(error, _NOT_OF_A_ROW):
        raise error
    text = printable(" ".join(str(error).split()))
    if isinstance(error, ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class BadRows:
    """What becomes of rows that can't be used: the first raises, or all are counted.

    Args:
        key: the setting that holds their source, such as "data.train", for the messages.
        policy: "refuse" or "skip".
    """

    def __init__(self, key: str, policy: str) -> None:
        self.key, self.policy = key, policy
        self.kinds: Counter[str] = Counter()
        self.first = ""

    def __call__(self, location: str, reason: str, cause: BaseException | None = None) -> None:
        """
        Raises:
            ValueError: bad rows are refused; the message names the row.
        """
        if self.policy == "refuse":
            raise ValueError(
                f"{location}: {reason}. Correct the row, or leave such rows out: data.on_bad_row: skip"
            ) from cause
        self.first = self.first or f"{location}: {reason}"
        self.kinds[re.sub(r"\d+", "N", reason.split(": ")[0])] += 1

    @contextmanager
    def at(self, location: str) -> Iterator[None]:
        """Whatever is raised within is the fault of the row there: it ends the run, or the row is counted."""
        try:
            yield
        except BaseException as error:  # a tokenizer that panics raises no Exception
            self(location, reason_of(error), error)

    def warn(self) -> None:
        if self.kinds:
            kinds = ", ".join(f"{count} × {kind}" for kind, count in self.kinds.most_common())
            message = f"{self.key}: {self.kinds.total()} rows are skipped: {kinds}. The first is {self.first}"
            rank_zero_warn(printable(message))


class LostRow(ValueError):
    """A row that was fine when the run began can no longer be used."""


def blames_rows(method: Method) -> Method:
    """For methods of a setting, or of what has a ``setting``, that take examples or trajectories: what they raise is
    said with the row that caused it.

    Raises:
        LostRow: one of the examples can no longer be used, as the setting's `refusal` says it: its image has vanished,
            or its template reads the clock. From what was raised.
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
