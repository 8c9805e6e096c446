"""Sources of examples: files, folders, reasoning-gym, a Python function, the Hugging Face hub.

Each of them becomes a `datasets.Dataset` with one extra column, `LOCATION`, with the place where a row was read
("train.jsonl, row 17"). It travels through selections and splits with its row, so that a message can name
the row, and it is dropped before any view or reward reads the examples.
"""

import inspect
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, concatenate_datasets, load_dataset, load_from_disk
from datasets.config import HF_DATASETS_CACHE
from lightning.pytorch.utilities import rank_zero_warn
from pyarrow.parquet import ParquetFile

from .imported import import_callable, import_reasoning_gym
from .printable import printable, quoted
from .remote import is_url, kept_copy
from .reward import encode_metadata
from .rows import LOCATION, STAND_IN, BadRows, location_of, reason_of
from .shipped import shipped
from .table import Doubled, as_object, kind, readable, tabulate, without_added_nulls

SUFFIXES = (".jsonl", ".json", ".parquet")
# Names of tables that are not read: compressed, of other formats, or with another spelling of SUFFIXES
_TABLE_NAME = re.compile(r"\.(csv|tsv|arrow|feather|ndjson|(jsonl?|parquet)(\.(gz|zst|bz2|xz|zip))?)$")
# Files of a folder that say which split they are of, as the hub names them: train-00000-of-00002.parquet
_SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![A-Za-z])")


def read_source(source: str, options: dict[str, Any], key: str, seed: int, bad: BadRows) -> Dataset:
    """Reads all rows of a source, with their `LOCATION`.

    Args:
        source: as in `PromptData`.
        options: arguments for the source.
        key: the setting that holds the source, such as "data.train", for the messages.
        seed: for a source that makes its rows; `options` may set another.
        bad: collects rows that can't be read or stored.

    Raises:
        ValueError: the source does not exist, can't be read, refuses its options, or has no rows.
        ModuleNotFoundError: reasoning-gym is not installed.
    """
    try:
        source = shipped(source)
    except FileNotFoundError as error:
        raise ValueError(f"{key}: {error}") from None
    scheme, _, name = source.partition(":")
    if scheme == "reasoning_gym":
        dataset = _from_reasoning_gym(name, {"seed": seed, **options}, key, bad)
    elif scheme == "python":
        dataset = _from_function(name, options, key, bad)
    elif is_url(source) and Path(source).suffix in SUFFIXES:
        dataset = _from_url(source, options, key, bad)
    elif is_local(source):
        dataset = _from_path(local_path(source), options, key, bad)
    else:
        dataset = _from_hub(source, options, key, bad)
    if not len(dataset):
        raise ValueError(f"{key}: {source!r} has no rows" + (f" that can be used: {bad.first}" if bad.first else ""))
    return dataset


def is_remote(source: str) -> bool:
    """Tells whether a source is downloaded."""
    return source.partition(":")[0] not in ("reasoning_gym", "python", "opd") and not is_local(source)


def is_local(source: str) -> bool:
    """Tells whether a source is, or can only be meant as, a file or folder of this machine."""
    path = local_path(source)
    looks_like_one = (
        # names of the hub have one slash at most, and hardly a suffix
        path.suffix in SUFFIXES
        or source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or ("/" in source and re.fullmatch(r"\.[A-Za-z]{2,8}", path.suffix) is not None)
    )
    return looks_like_one or path.exists()


def same_rows(source: str, other: str, options: dict[str, Any], other_options: dict[str, Any]) -> bool:
    """Tells whether two sources with their options are one; a task draws other rows for each split without a seed."""
    drawn = source.startswith("reasoning_gym:") and "seed" not in options
    files = [local_path(shipped(text)).resolve() if is_local(shipped(text)) else text for text in (source, other)]
    return files[0] == files[1] and options == other_options and not drawn


def local_path(text: str) -> Path:
    """Converts a text to a path; a ``~`` in front is a home folder, unless no user of that name has one."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _from_path(path: Path, options: dict[str, Any], key: str, bad: BadRows) -> Dataset:
    if not path.exists():
        raise ValueError(f"{key}: there is no file or folder {str(path)!r}")
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        return _from_saved(path, options, key, bad)
    return _from_files(path, options, key, bad)


def _from_url(url: str, options: dict[str, Any], key: str, bad: BadRows) -> Dataset:
    """Reads a file that is elsewhere from a copy here."""
    try:
        copy = kept_copy(url, Path(HF_DATASETS_CACHE, "opd-lightning", "copies"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error
    try:
        return _from_path(copy, options, key, bad)
    except ValueError as error:
        raise ValueError(f"{error} ({copy} is a copy of {url})") from error


def _from_saved(folder: Path, options: dict[str, Any], key: str, bad: BadRows) -> Dataset:
    """Reads a folder of `Dataset.save_to_disk`, or of `DatasetDict.save_to_disk` the split that the option names."""
    if unknown := set(options) - {"split"}:
        raise ValueError(
            f"{key}_options: {', '.join(sorted(unknown))} mean nothing to a folder of save_to_disk (it takes 'split')"
        )
    try:
        saved = load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(f"{key}: can't read {folder}, a folder of save_to_disk: {_root(error)}") from error
    split = options.get("split")
    if isinstance(saved, DatasetDict) and split is not None:
        if split not in saved:
            raise ValueError(f"{key}: {folder} has no split {split!r}; it has {', '.join(saved)}: {key}_options.split")
        return _located(saved[split], f"{folder}[{split}]", bad)
    if split is not None:
        raise ValueError(f"{key}_options: split means nothing to {folder}, which holds a single data set")
    return _located(_only_split(saved, str(folder), key), str(folder), bad)


def _only_split(dataset: Dataset | DatasetDict, name: str, key: str) -> Dataset:
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{key}: {name!r} has the splits {', '.join(dataset)}; name one: {key}_options.split")
    return dataset


def _from_files(path: Path, options: dict[str, Any], key: str, bad: BadRows) -> Dataset:
    files = _files_in(path, key) if path.is_dir() else [path]
    kinds = {file.suffix for file in files}
    if not kinds <= set(SUFFIXES):
        raise ValueError(f"{key}: can't read {str(path)!r}; a file must be one of {', '.join(SUFFIXES)}")
    if ".parquet" in kinds and len(kinds) > 1:
        raise ValueError(f"{key}: {str(path)!r} holds Parquet and JSON files; name one kind, or one file")
    field = _take_field(options, kinds, key)
    if kinds == {".parquet"}:
        return _from_parquet(files, key, bad)
    rows: list[tuple[str, Any]] = []
    for file in files:
        try:
            values = json_lines(file, bad) if file.suffix == ".jsonl" else _json_list(file, field, key)
            rows += [(f"{file}, row {number}", row) for number, row in values]
        except OSError as error:
            raise ValueError(f"{key}: can't read {file}: {error.strerror or error}") from error
    return tabulate(rows, key, bad)


def _files_in(folder: Path, key: str) -> list[Path]:
    """Lists the files of a folder that hold rows, without hidden ones and those of `datasets` itself."""
    # 1. tables, without what `datasets` writes beside them
    inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    tables = [path for path in inside if path.suffix in SUFFIXES and not path.is_dir()]
    files = [file for file in tables if file.name not in ("dataset_info.json", "dataset_infos.json")]
    if lost := [path.name for path in files if not path.exists()]:
        raise ValueError(f"{key}: {str(folder)!r} holds a link to a file that is not there: {lost[0]}")
    # 2. what is left out
    if files and (unread := [path.name for path in inside if _holds_other_rows(path)]):
        rank_zero_warn(
            printable(
                f"{key}: of {str(folder)!r} {', '.join(f.name for f in files)} are read; {', '.join(unread)} are not"
            )
        )
    if not files:
        within = sorted({f.parent for f in folder.glob("*/*") if f.suffix in SUFFIXES})
        hint = f"; {str(within[0])!r} does" if within else ""
        raise ValueError(f"{key}: the folder {str(folder)!r} holds no {', '.join(SUFFIXES)} file{hint}")
    # 3. rows of one split only
    splits = {match[1] for file in files if (match := _SPLIT_NAME.match(file.name))}
    if len(splits) > 1:
        raise ValueError(
            f"{key}: {str(folder)!r} holds files of several splits, {', '.join(file.name for file in files)}: "
            "rows of one would be read as rows of the other. Name one file"
        )
    return files


def _holds_other_rows(path: Path) -> bool:
    """Tells whether a path that is not read, beside files that are, may hold rows."""
    if path.is_dir():
        return any(file.suffix in SUFFIXES for file in path.iterdir() if not file.name.startswith("."))
    return path.suffix not in SUFFIXES and _TABLE_NAME.search(path.name.lower()) is not None


def _take_field(options: dict[str, Any], kinds: set[str], key: str) -> str | None:
    accepted = {"field"} if kinds == {".json"} else set()
    if unknown := set(options) - accepted:
        raise ValueError(
            f"{key}_options: {', '.join(sorted(unknown))} mean nothing to these files"
            + (" (a .json file takes 'field', the key that holds the list of rows)" if accepted else "")
        )
    return options.get("field")


def json_lines(file: Path, bad: BadRows) -> Iterator[tuple[int, Any]]:
    """Yields each line's number, from 1, and its value; blank lines are skipped, invalid ones are bad rows."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                # `json` alone would guess at other encodings, line by line
                row = json.loads(line.rstrip().decode("utf-8-sig"), object_pairs_hook=as_object)
                if isinstance(row, Doubled):
                    raise ValueError(row.reason)
            except Exception as error:
                bad(f"{file}, row {number}", f"invalid JSON: {_why_no_json(error, line)}", error)
            else:
                yield number, row


def _why_no_json(error: Exception, line: bytes) -> str:
    if isinstance(error, json.JSONDecodeError):
        near = error.doc[max(error.pos - 12, 0) : error.pos + 8]
        what = error.msg.removesuffix(" at")
        return f"{what} at column {error.colno}, near {quoted(near)}; write one JSON object a line"
    if isinstance(error, UnicodeDecodeError):
        what = "UTF-16" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else f"not UTF-8 at byte {error.start + 1}"
        return f"{what}; save the file as UTF-8"
    return "nested too deeply" if isinstance(error, RecursionError) else reason_of(error)


def _json_list(file: Path, field: str | None, key: str) -> Iterable[tuple[int, Any]]:
    try:
        content = json.loads(file.read_bytes(), object_pairs_hook=as_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: {file} is not valid JSON: {reason_of(error)}") from error
    if isinstance(content, Doubled):
        raise ValueError(f"{key}: {file}: {content.reason}")
    if field is not None:
        if not isinstance(content, dict) or field not in content:
            raise ValueError(f"{key}: {file} has no key {field!r} ({key}_options.field)")
        content = content[field]
    if not isinstance(content, list):
        hint = f"; its keys are {', '.join(content)}" if isinstance(content, dict) else ""
        raise ValueError(
            f"{key}: {file} holds {kind(content)} where a list of objects is needed{hint}. "
            f"Name the key that holds the list in {key}_options.field, or write one object a line as .jsonl"
        )
    return enumerate(content, start=1)


def _from_parquet(files: list[Path], key: str, bad: BadRows) -> Dataset:
    tables = []
    for file in files:
        try:
            table = Dataset.from_file(str(as_arrow(file)))
        except Exception as error:
            column = _unknown_column(file)
            where = f"{file}, column {column!r}" if column is not None else file
            raise ValueError(f"{key}: can't read {where}: {_root(error)}") from error
        tables.append(_located(table, str(file), bad))
    try:
        return concatenate_datasets(tables)
    except ValueError as error:
        raise ValueError(f"{key}: {files[0].parent} holds files of different columns: {error}") from error


def _unknown_column(file: Path) -> str | None:
    """Names the first column of a Parquet file whose type `datasets` does not know; None if there is none."""
    with suppress(pa.ArrowException, OSError), file.open("rb") as stored:
        for field in ParquetFile(stored).schema_arrow:
            try:
                Features.from_arrow_schema(pa.schema([field]))
            except (ValueError, NotImplementedError):
                return str(field.name)
    return None


def as_arrow(file: Path) -> Path:
    """Copies a Parquet file, once, to an Arrow file in the cache of `datasets` that can be mapped into memory.

    `datasets` itself would take the path for a pattern: with brackets, variables and URLs in it.
    """
    state = file.stat()
    version = f"{file.absolute()} {state.st_size} {state.st_mtime_ns}"
    copy = Path(HF_DATASETS_CACHE, "opd-lightning", f"{sha256(version.encode()).hexdigest()}.arrow")
    if copy.exists():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    with file.open("rb") as stored, tempfile.NamedTemporaryFile(dir=copy.parent, delete=False) as partial:
        table = ParquetFile(stored)
        with pa.ipc.new_stream(partial, table.schema_arrow) as writer:
            for batch in table.iter_batches(batch_size=1000):
                writer.write_batch(batch)
    os.replace(partial.name, copy)
    return copy


def _from_reasoning_gym(task: str, options: dict[str, Any], key: str, bad: BadRows) -> Dataset:
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
    return tabulate([(f"reasoning_gym:{task}, row {n}", row) for n, row in enumerate(rows, 1)], key, bad)


def _from_function(path: str, options: dict[str, Any], key: str, bad: BadRows) -> Dataset:
    function = import_callable(path, key)
    if "on_bad_row" in inspect.signature(function).parameters:
        options = {"on_bad_row": "skip" if bad.policy == "skip" else "refuse", **options}
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise ValueError(f"{key}: {path} does not take the arguments of {key}_options: {error}") from error
    try:
        rows = function(**options)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{key}: {path}: {reason_of(error)}") from error
    if isinstance(rows, Dataset):
        return rows if LOCATION in rows.column_names else _located(rows, f"python:{path}", bad)
    if not isinstance(rows, list | tuple):
        raise ValueError(f"{key}: {path} must return a list of dicts, one a row; it returned {kind(rows)}")
    return tabulate([(location_of(row) or f"python:{path}, row {n}", row) for n, row in enumerate(rows, 1)], key, bad)


def _from_hub(name: str, options: dict[str, Any], key: str, bad: BadRows) -> Dataset:
    for option in {"trust_remote_code", "streaming"} & set(options):
        raise ValueError(f"{key}_options: {option} is not supported; rows are read, never run or streamed")
    try:
        dataset = load_dataset(name, **options)
    except Exception as error:
        raise ValueError(
            f"{key}: {name!r} is no file or folder here, and the hub did not give it as a data set "
            f"with {options}: {_root(error)}"
        ) from error
    dataset = _only_split(dataset, name, key)
    return _located(dataset, f"{name}[{dataset.split}]", bad)


def _located(dataset: Dataset, origin: str, bad: BadRows) -> Dataset:
    """Adds the `LOCATION` of each row, and drops rows that can't be read and nulls that nobody wrote."""
    taken = {LOCATION, STAND_IN} & set(dataset.column_names)
    if taken:
        raise ValueError(f"{origin}: the column name {taken.pop()!r} is kept for the library; rename the column")
    if dataset.format["type"] == "custom":
        raise ValueError(f"{origin}: what with_transform or set_transform makes of rows can't be stored; use map")
    # rows are Python's values, whatever the data set was told to give (tensors, some columns only)
    located = dataset.with_format(None).add_column(LOCATION, [f"{origin}, row {n}" for n in range(1, len(dataset) + 1)])
    return without_added_nulls(readable(located, bad))


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
