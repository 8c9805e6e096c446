"""Tables of rows: values come back as they were written, or their row is bad."""

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

# Types that a column of Arrow holds unchanged; numbers are integers or floats, never both
_PLAIN: set[type] = {str, int, float, bool}
# Of nesting: walks through values, here and in templates, are recursive
DEEPEST = 100


@dataclass
class Written:
    """Column of JSON that is read back as it was written.

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
    """Object of JSON with several values under one key, all but the last of which are lost."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.reason = f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice"


def as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a dict of an object of JSON, `Doubled` where a key occurs twice: a bad row."""
    mapping = dict(pairs)
    return mapping if len(mapping) == len(pairs) else Doubled(pairs)


def tabulate(rows: list[tuple[str, Any]], key: str, bad: BadRows | None = None) -> Dataset:
    """Builds a data set of (location, row) pairs, with all columns that occur, empty where a row lacks one.

    A row is bad that is no object, that holds what can't be stored, or a value of another kind than most of its column.

    Args:
        rows: locations and values.
        key: the setting that holds their source, for the messages.
        bad: collects bad rows. Default: they are refused.

    Raises:
        ValueError: a bad row where these are refused; a column that Arrow can't store.
    """
    bad = bad or BadRows(key, "refuse")
    usable = []
    for location, row in rows:
        with bad.at(location):
            _check(row)
            usable.append((location, as_stored(row)))
    usable = _of_one_kind(usable, bad)
    columns = [Dataset.from_dict({LOCATION: [location for location, _ in usable]})]
    for name in dict.fromkeys(name for _, row in usable for name in row):
        try:
            columns.append(_column(name, [row.get(name) for _, row in usable]))
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            storable = _storable(name, usable, bad)
            if len(storable) == len(usable):  # each by itself, but not together
                raise ValueError(f"{key}: can't store the column {name!r}: {error}") from error
            return tabulate(storable, key, bad)
    return concatenate_datasets(columns, axis=1)


def readable(dataset: Dataset, bad: BadRows) -> Dataset:
    """Selects the rows of a table that can be read: a file may hold text that is not UTF-8."""
    try:
        dataset.data.table.validate(full=True)
    except pa.ArrowException:
        pass
    else:
        return dataset
    indices = []
    for index, location in enumerate(dataset[LOCATION]):
        with bad.at(location):
            _check_readable(dataset.with_format("arrow")[index])
            indices.append(index)
    return dataset.select(indices)


def without_added_nulls(dataset: Dataset) -> Dataset:
    """Drops the keys of messages and tools that are null in them.

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
    """Returns images, sounds, … as {bytes, path}, as `open_image` takes them.

    `datasets` itself would decode them, read or not, by rules of its own and by any decoder, and fail without naming
    the row.
    """
    features = Features({name: _undecoded(feature) for name, feature in rows.features.items()})
    return rows if features == rows.features else rows.cast(features)


def kind(value: Any) -> str:
    """Names the kind of a value, for messages."""
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
        for name, inner in value.items():
            if not isinstance(name, str):
                raise ValueError(f"a key that is no text: {name!r}")
            _check_value(name)
            _check_value(inner, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_value(inner, depth + 1)
    elif isinstance(value, set | frozenset):
        raise ValueError("a set, which has no order; make it a list")


def _of_one_kind(rows: list[tuple[str, dict[str, Any]]], bad: BadRows) -> list[tuple[str, dict[str, Any]]]:
    """Selects the rows whose values are all of their column's most frequent kind."""
    odd: dict[str, str] = {}
    for name in dict.fromkeys(name for _, row in rows for name in row):
        kinds = [(location, _sort(row[name])) for location, row in rows if row.get(name) is not None]
        (usual, _), *rest = Counter(sort for _, sort in kinds).most_common() or [("", 0)]
        if not rest:
            continue
        first = next(location for location, sort in kinds if sort == usual)
        for location, sort in kinds:
            if sort != usual:
                reason = f"{name!r} is {usual} in {first}, and {sort} in {location}; make it the same everywhere"
                odd.setdefault(location, f"the column is of two kinds: {reason}")
    for location, reason in odd.items():
        bad(location, reason)
    return [(location, row) for location, row in rows if location not in odd]


def _sort(value: Any) -> str:
    """Names the kind of a value; kinds that may share a column have one name."""
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
    """Tells whether numbers kept their type, integer or float, when they were stored."""
    if isinstance(value, dict):
        return all(_keeps_numbers(stored[name], inner) for name, inner in value.items())
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
    usable = []
    for location, row in rows:
        with bad.at(location):
            try:
                _column(name, [row.get(name)])
            except Exception as error:
                raise ValueError(f"can't store the column {name!r}: {kind(row.get(name))}: {error}") from error
            usable.append((location, row))
    return usable


def _lists_messages(feature: Any) -> bool:
    """Tells whether a column holds chats, or the tools of one."""
    inner = feature.feature if isinstance(feature, List | LargeList) else None
    return isinstance(inner, dict) and bool({"role", "function"} & set(inner)) and "binary" not in str(inner)


def _drop(name: str, values: list[Any]) -> dict[str, list[Any]]:
    # what JSON lacks, such as times, is written as text
    return {name: [None if value is None else json.dumps(_dropped(value), default=str) for value in values]}


def _dropped(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _dropped(inner) for name, inner in value.items() if inner is not None or name == "content"}
    return [_dropped(inner) for inner in value] if isinstance(value, list) else value


def _undecoded(feature: Any) -> Any:
    if getattr(feature, "decode", False) and pa.types.is_struct(feature.pa_type):
        return replace(feature, decode=False)
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), length=feature.length)
    if isinstance(feature, LargeList):
        return LargeList(_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    return feature
