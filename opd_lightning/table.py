"""Rows as a table: values come back as they were written, or their row is bad."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import pyarrow as pa
from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets
from datasets.features.features import register_feature

from .images import as_stored
from .rows import LOCATION, STAND_IN, BadRows, reason_of

# What a column of its own type in Arrow holds without changing it; numbers are whole or not, never both
_PLAIN: set[type] = {str, int, float, bool}
# What walks through values, here and in templates, is recursive
DEEPEST = 100


@dataclass
class Written:
    """A column of JSON that is read back as it was written.

    Arrow would give every message the keys of all others, as nulls, and every number a decimal point if one has it;
    `datasets.Json` rounds numbers to ten places and reads the text "5" as a number.
    """

    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="Written", init=False, repr=False)

    def __call__(self) -> Any:
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        return None if value is None else json.dumps(value)

    def decode_example(self, text: str | None, token_per_repo_id: Any = None) -> Any:
        return None if text is None else json.loads(text)

    def cast_storage(self, storage: Any) -> Any:
        return storage.cast(self.pa_type)


with warnings.catch_warnings():  # registering is called experimental
    warnings.simplefilter("ignore")
    register_feature(Written, "Written")


class Doubled(dict[str, Any]):
    """An object of JSON that has several values under one key; all but the last are lost."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.reason = f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice"


def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What `json` makes of an object: a dict that says where a key occurs twice, and so is a bad row."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else Doubled(pairs)


def tabulate(rows: list[tuple[str, Any]], key: str, bad: BadRows | None = None) -> Dataset:
    """A data set of (location, row) pairs; its columns are all that occur, empty where a row lacks one.

    A row is bad that is no object, that holds what can't be stored, or a value of another kind than most of its column.

    Args:
        rows: their locations and what was read there.
        key: the setting that holds their source, for the messages.
        bad: what becomes of bad rows. Default: they are refused.

    Raises:
        ValueError: a bad row where these are refused; a column that Arrow can't store.
    """
    bad = bad or BadRows(key, "refuse")
    kept = []
    for location, row in rows:
        with bad.at(location):
            _check(row)
            kept.append((location, as_stored(row)))
    kept = _of_one_kind(kept, bad)
    columns = [Dataset.from_dict({LOCATION: [location for location, _ in kept]})]
    for name in dict.fromkeys(name for _, row in kept for name in row):
        try:
            columns.append(_column(name, [row.get(name) for _, row in kept]))
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            storable = _storable(name, kept, bad)
            if len(storable) == len(kept):  # each by itself, but not together
                raise ValueError(f"{key}: can't store the column {name!r}: {error}") from error
            return tabulate(storable, key, bad)
    return concatenate_datasets(columns, axis=1)


def readable(dataset: Dataset, bad: BadRows) -> Dataset:
    """The rows of a table that can be read: a file may hold text that is none."""
    try:
        dataset.data.table.validate(full=True)
    except pa.ArrowException:
        pass
    else:
        return dataset
    kept = []
    for index, location in enumerate(dataset[LOCATION]):
        with bad.at(location):
            _check_readable(dataset.with_format("arrow")[index])
            kept.append(index)
    return dataset.select(kept)


def without_added_nulls(dataset: Dataset) -> Dataset:
    """The same, where messages and tools lack the keys that are null in them.

    Parquet gives every message, and every argument of a tool call, the keys of all others. A null that was meant can't
    be told from those; the content of a message stays, null or not.
    """
    for name, feature in dataset.features.items():
        if not _lists_messages(feature):
            continue
        features = Features({**dataset.features, name: Written()})
        drop = partial(_drop, name)
        dataset = dataset.map(drop, input_columns=[name], batched=True, features=features, desc=f"reading {name}")
    return dataset


def undecoded(rows: Dataset) -> Dataset:
    """The data set with its images, sounds, … as {bytes, path}, as `open_image` takes them: `datasets` itself would
    decode them, read or not, by rules of its own and by any decoder, and fail without naming the row."""
    features = Features({name: _undecoded(feature) for name, feature in rows.features.items()})
    return rows if features == rows.features else rows.cast(features)


def kind(value: Any) -> str:
    """What a value is, for messages."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "null": type(None),
        "a boolean": bool,
        "a number": (int, float),
        "text": str,
        "a list": (list, tuple),
        "an object": dict,
    }
    return next((name for name, kind in kinds.items() if isinstance(value, kind)), f"a {type(value).__name__}")


def _check(row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {kind(row)}: write one JSON object a row")
    if isinstance(row, Doubled):
        raise ValueError(row.reason)
    for name, value in row.items():
        if not isinstance(name, str) or not name.isprintable() or name in (LOCATION, STAND_IN):
            raise ValueError(f"no name for a column: {name!r}; rename it")
        try:
            _check_value(value)
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError("too large a number for 64 bits; write it as text")
        except ValueError as error:
            raise ValueError(f"can't store the column {name!r}: {error}") from None


def _check_readable(row: pa.Table) -> None:
    for name in row.column_names:
        try:
            row[name].to_pylist()
        except Exception as error:
            raise ValueError(f"can't read the column {name!r}: {reason_of(error)}") from error


def _check_value(value: Any, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} deep")
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("half a character (a lone surrogate), as of an emoji that was cut in two")
    elif isinstance(value, dict):
        if isinstance(value, Doubled):
            raise ValueError(value.reason)
        for name, one in value.items():
            if not isinstance(name, str):
                raise ValueError(f"a key that is no text: {name!r}")
            _check_value(name)
            _check_value(one, depth + 1)
    elif isinstance(value, list | tuple):
        for one in value:
            _check_value(one, depth + 1)
    elif isinstance(value, set | frozenset):
        raise ValueError("a set, which has no order; make it a list")


def _of_one_kind(rows: list[tuple[str, dict[str, Any]]], bad: BadRows) -> list[tuple[str, dict[str, Any]]]:
    """The rows whose values are all of the kind that most values of their column are."""
    odd: dict[str, str] = {}
    for name in dict.fromkeys(name for _, row in rows for name in row):
        found = [(location, _sort(row[name])) for location, row in rows if row.get(name) is not None]
        (usual, _), *others = Counter(sort for _, sort in found).most_common() or [("", 0)]
        if not others:
            continue
        first = next(location for location, sort in found if sort == usual)
        for location, sort in found:
            if sort != usual:
                reason = f"{name!r} is {usual} in {first}, and {sort} in {location}; make it the same everywhere"
                odd.setdefault(location, f"the column is of two kinds: {reason}")
    for location, reason in odd.items():
        bad(location, reason)
    return [(location, row) for location, row in rows if location not in odd]


def _sort(value: Any) -> str:
    """The kind of a value, where those that may share a column are one."""
    return kind(int(value)) if isinstance(value, bool) else kind(value)


def _column(name: str, values: list[Any]) -> Dataset:
    types = {type(value) for value in values if value is not None}
    plain = len(types) <= 1 and types <= _PLAIN
    features = None if plain or not _is_json(values) else Features({name: Written()})
    column = Dataset.from_dict({name: values}, features=features)
    feature = column.features[name]
    if not plain and isinstance(feature, Value) and column[name][:] != values:
        raise ValueError("it would be changed, as times of several zones are")
    nested = isinstance(feature, List | LargeList | dict) and "binary" not in str(feature)
    if nested and not all(map(_keeps_numbers, column[name][:], values)):
        raise ValueError("numbers beside what JSON lacks (times, …) would be changed; write either as text")
    return column


def _keeps_numbers(stored: Any, value: Any) -> bool:
    """Whether what was stored has the same numbers, whole or not, as the value."""
    if isinstance(value, dict):
        return all(_keeps_numbers(stored[name], one) for name, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_keeps_numbers, stored, value))
    return type(value) not in (int, float) or type(stored) is type(value)


def _is_json(values: list[Any]) -> bool:
    try:
        json.dumps(values)
    except TypeError:
        return False
    return True


def _storable(name: str, rows: list[tuple[str, dict[str, Any]]], bad: BadRows) -> list[tuple[str, dict[str, Any]]]:
    kept = []
    for location, row in rows:
        with bad.at(location):
            try:
                _column(name, [row.get(name)])
            except Exception as error:
                raise ValueError(f"can't store the column {name!r}: {kind(row.get(name))}: {error}") from error
            kept.append((location, row))
    return kept


def _lists_messages(feature: Any) -> bool:
    """Whether a column holds chats, or the tools of one."""
    inner = feature.feature if isinstance(feature, List | LargeList) else None
    return isinstance(inner, dict) and bool({"role", "function"} & set(inner)) and "binary" not in str(inner)


def _drop(name: str, values: list[Any]) -> dict[str, list[Any]]:
    # what JSON lacks, such as times, is written as text
    return {name: [None if value is None else json.dumps(_dropped(value), default=str) for value in values]}


def _dropped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _dropped(one) for name, one in value.items() if one is not None or name == "content"}
    return [_dropped(one) for one in value] if isinstance(value, list) else value


def _undecoded(feature: Any) -> Any:
    if getattr(feature, "decode", False) and pa.types.is_struct(feature.pa_type):
        return replace(feature, decode=False)
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), length=feature.length)
    if isinstance(feature, LargeList):
        return LargeList(_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _undecoded(part) for name, part in feature.items()}
    return feature
