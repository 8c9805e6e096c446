"""Where examples come from: files, folders, reasoning-gym, a Python function, the Hugging Face hub.

Each of them becomes a `datasets.Dataset` with one extra column, `LOCATION`, that says where a row was read
("train.jsonl, row 17"). It travels through selections and splits with its row, so that a message can name
the row, and it is dropped before anybody sees the examples.
"""

import inspect
import json
import re
from ast import literal_eval
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Image, Json, LargeList, List, concatenate_datasets, load_dataset

from .reward import import_callable, import_reasoning_gym

LOCATION = "__location__"
SUFFIXES = (".jsonl", ".json", ".parquet")

Reject = Callable[[str, str], None]
"""Told (location, reason) of a row that can't be read; raises if rows may not be skipped."""


def read_source(source: str, options: dict[str, Any], key: str, seed: int, reject: Reject) -> Dataset:
    """All rows of a source, with their `LOCATION`.

    Args:
        source: as in `PromptData`.
        options: arguments for the source.
        key: the setting that holds the source, such as "data.train", for the messages.
        seed: for a source that makes its rows; `options` may set another.
        reject: what happens to a line that is no row.

    Raises:
        ValueError: the source does not exist, can't be read, refuses its options, or has no rows.
        ModuleNotFoundError: reasoning-gym is not installed.
    """
    scheme, _, name = source.partition(":")
    if scheme == "reasoning_gym":
        dataset = _from_reasoning_gym(name, {"seed": seed, **options}, key)
    elif scheme == "python":
        dataset = _from_function(name, options, key)
    elif is_local(source):
        dataset = _from_files(Path(source).expanduser(), options, key, reject)
    else:
        dataset = _from_hub(source, options, key)
    if not len(dataset):
        raise ValueError(f"{key}: {source!r} has no rows")
    return dataset


def is_remote(source: str) -> bool:
    """Whether the source is downloaded."""
    return source.partition(":")[0] not in ("reasoning_gym", "python") and not is_local(source)


def is_local(source: str) -> bool:
    """Whether the source is, or can only be meant as, a file or folder of this machine."""
    path = Path(source).expanduser()
    looks_like_one = (
        path.suffix in SUFFIXES
        or source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or ("/" in source and re.fullmatch(r"\.[A-Za-z]{2,8}", path.suffix) is not None)
    )
    return path.exists() or looks_like_one


def _from_files(path: Path, options: dict[str, Any], key: str, reject: Reject) -> Dataset:
    if not path.exists():
        raise ValueError(f"{key}: there is no file or folder {str(path)!r}")
    files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{key}: the folder {str(path)!r} holds no {', '.join(SUFFIXES)} file")
    kinds = {file.suffix for file in files}
    if not kinds <= set(SUFFIXES):
        raise ValueError(f"{key}: can't read {str(path)!r}; a file must be one of {', '.join(SUFFIXES)}")
    if ".parquet" in kinds and len(kinds) > 1:
        raise ValueError(f"{key}: {str(path)!r} holds Parquet and JSON files; name one kind, or one file")
    field = _take_field(options, kinds, key)
    if kinds == {".parquet"}:
        return _from_parquet(files, key)
    rows: list[tuple[str, dict[str, Any]]] = []
    for file in files:
        found = _json_lines(file, reject) if file.suffix == ".jsonl" else _json_list(file, field, key)
        for number, row in found:
            location = f"{file}, row {number}"
            if isinstance(row, dict):
                rows.append((location, row))
            else:
                reject(location, f"not an object but {_kind(row)}: write one JSON object a row")
    return tabulate(rows, key)


def _take_field(options: dict[str, Any], kinds: set[str], key: str) -> str | None:
    known = {"field"} if kinds == {".json"} else set()
    if unknown := set(options) - known:
        raise ValueError(
            f"{key}_options: {', '.join(sorted(unknown))} mean nothing to these files"
            + (" (a .json file takes 'field', the key that holds the list of rows)" if known else "")
        )
    return options.get("field")


def _json_lines(file: Path, reject: Reject) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                reject(f"{file}, row {number}", f"invalid JSON: {error.msg} at column {error.colno}")
            except UnicodeDecodeError as error:
                reject(f"{file}, row {number}", f"invalid JSON: not UTF-8 at byte {error.start + 1}")


def _json_list(file: Path, field: str | None, key: str) -> Iterable[tuple[int, Any]]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{key}: {file} is not valid JSON: {error}") from error
    if field is not None:
        if not isinstance(content, dict) or field not in content:
            raise ValueError(f"{key}: {file} has no key {field!r} ({key}_options.field)")
        content = content[field]
    if not isinstance(content, list):
        hint = f"; its keys are {', '.join(content)}" if isinstance(content, dict) else ""
        raise ValueError(
            f"{key}: {file} holds {_kind(content)} where a list of objects is needed{hint}. "
            f"Name the key that holds the list in {key}_options.field, or write one object a line as .jsonl"
        )
    return enumerate(content, start=1)


def _from_parquet(files: list[Path], key: str) -> Dataset:
    parts = []
    for file in files:
        try:
            part = Dataset.from_parquet(str(file))
        except Exception as error:
            raise ValueError(f"{key}: can't read {file}: {_root(error)}") from error
        parts.append(_locate(part, str(file)))
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise ValueError(f"{key}: {files[0].parent} holds files of different columns: {error}") from error


def _from_reasoning_gym(task: str, options: dict[str, Any], key: str) -> Dataset:
    gym = import_reasoning_gym(f"{key}: reasoning_gym:{task}")
    try:
        items = list(gym.create_dataset(task, **options))
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{key}: reasoning-gym refused the task {task!r} with {options}: {error}") from error
    rows = [
        {
            "prompt": item["question"],
            "answer": item["answer"],
            # of a composite task each item names the one that it came from
            "task": item["metadata"].get("source_dataset", task),
            "metadata": encode_metadata(item["metadata"]),
        }
        for item in items
    ]
    return tabulate([(f"reasoning_gym:{task}, row {n}", row) for n, row in enumerate(rows, 1)], key)


def encode_metadata(metadata: Any) -> str:
    """reasoning-gym metadata as text; `reward.decode_metadata` reads it.

    A Python literal rather than JSON, because some scorers (arc_agi, rearc) compare tuples with tuples, which
    JSON would turn into lists; JSON where the metadata holds what no literal can say.
    """
    text = repr(metadata)
    try:
        literal_eval(text)
    except (ValueError, SyntaxError):
        return json.dumps(metadata, default=str)
    return text


def _from_function(path: str, options: dict[str, Any], key: str) -> Dataset:
    function = import_callable(path, key)
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise ValueError(f"{key}: {path} does not take the arguments of {key}_options: {error}") from error
    rows = function(**options)
    if isinstance(rows, Dataset):
        return _locate(rows, f"python:{path}")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{key}: {path} must return a list of dicts, one a row; it returned {_kind(rows)}")
    return tabulate([(f"python:{path}, row {n}", row) for n, row in enumerate(rows, 1)], key)


def _from_hub(name: str, options: dict[str, Any], key: str) -> Dataset:
    for option in {"trust_remote_code", "streaming"} & set(options):
        raise ValueError(f"{key}_options: {option} is not supported; rows are read, never run or streamed")
    try:
        dataset = load_dataset(name, **options)
    except Exception as error:
        raise ValueError(
            f"{key}: {name!r} is no file or folder here, and the hub did not give it as a data set "
            f"with {options}: {_root(error)}"
        ) from error
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{key}: {name!r} has the splits {', '.join(dataset)}; name one: {key}_options.split")
    return _locate(dataset, f"{name}[{dataset.split}]")


def _locate(dataset: Dataset, origin: str) -> Dataset:
    return dataset.add_column(LOCATION, [f"{origin}, row {n}" for n in range(1, len(dataset) + 1)])


def tabulate(rows: list[tuple[str, dict[str, Any]]], key: str) -> Dataset:
    """A data set of (location, row) pairs; its columns are all that occur, empty where a row lacks one.

    Raises:
        ValueError: a column holds values of different kinds, or values that Arrow can't store.
    """
    locations = [location for location, _ in rows]
    columns = [Dataset.from_dict({LOCATION: locations})]
    for name in dict.fromkeys(name for _, row in rows for name in row):
        values = [row.get(name) for _, row in rows]
        _check_one_kind(name, values, locations)
        try:
            columns.append(Dataset.from_dict({name: values}, features=_features(name, values)))
        except (pa.ArrowException, OverflowError) as error:
            raise ValueError(f"{key}: can't store the column {name!r}: {error}") from error
    return concatenate_datasets(columns, axis=1)


def undecoded(rows: Dataset) -> Dataset:
    """The data set with its images as {bytes, path}, as `open_image` takes them: `datasets` itself would decode them by
    rules of its own, by any decoder, and fail without naming the row."""
    features = Features({name: _undecoded(feature) for name, feature in rows.features.items()})
    return rows if features == rows.features else rows.cast(features)


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, Image):
        return Image(mode=feature.mode, decode=False)
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), length=feature.length)
    if isinstance(feature, LargeList):
        return LargeList(_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _undecoded(part) for name, part in feature.items()}
    return feature


def _features(name: str, values: list[Any]) -> Features | None:
    """Nested values are kept as JSON: Arrow would give every message the keys of all others, as nulls."""
    if not any(isinstance(value, list | dict) for value in values):
        return None
    try:
        json.dumps(values)
    except TypeError:
        return None
    return Features({name: Json()})


def _check_one_kind(name: str, values: list[Any], locations: list[str]) -> None:
    first: dict[str, str] = {}
    for value, location in zip(values, locations, strict=True):
        if value is not None:
            first.setdefault(_kind(value), location)
    if len(first) > 1:
        (one, here), (other, there), *_ = first.items()
        raise ValueError(f"the column {name!r} is {one} in {here}, and {other} in {there}; make it the same everywhere")


def _kind(value: Any) -> str:
    kinds: dict[str, type | tuple[type, ...]] = {
        "null": type(None),
        "a boolean": bool,
        "a number": (int, float),
        "text": str,
        "a list": (list, tuple),
        "an object": dict,
    }
    return next((name for name, kind in kinds.items() if isinstance(value, kind)), f"a {type(value).__name__}")


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
