"""Fingerprints of rows, by which a resumed run recognizes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from .trajectory import Example

IMAGE_FILE = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)
# Bytes from a file's beginning; with its size they tell apart what an epoch would take too long to read in full
FILE_BYTES = 2**14


def of_rows(rows: Sequence[Example]) -> Tensor:
    """Computes a fingerprint per row, ``[N]`` int32, of all its columns in any order.

    Four bytes a row, so that a checkpoint stays small over millions of them; an edited row goes unnoticed once in 2³².
    Images count by what they hold, files of images by name, size and beginning, so that data may move.
    """
    return torch.from_numpy(np.frombuffer(b"".join(digests(rows, 4)), np.int32).copy())


def digests(rows: Sequence[Example], size: int, columns: Sequence[str] | None = None) -> Iterator[bytes]:
    """Yields a digest of ``size`` bytes per row, of those of its columns that are named. Default: of all."""
    for row in _raw(rows):
        yield _digest(_plain(row if columns is None else {name: row.get(name) for name in columns}), size)


def first_difference(mine: Tensor, theirs: Tensor) -> int | None:
    """Finds the index of the first row that differs, or at which the shorter one ends; None: they are equal."""
    both = min(len(mine), len(theirs))
    different = (mine[:both] != theirs[:both]).nonzero()
    if len(different):
        return int(different[0])
    return None if len(mine) == len(theirs) else both


def _raw(rows: Sequence[Example]) -> Iterator[Example]:
    """Yields the rows as they are stored: images are not decoded."""
    if isinstance(rows, Dataset):
        for table in rows.with_format("arrow").iter(1000):
            yield from table.to_pylist()
    else:
        yield from (rows[i] for i in range(len(rows)))


def _digest(value: Any, size: int) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


def _plain(value: Any) -> Any:
    """Converts a value to what JSON can hold, with digests in place of large values."""
    if isinstance(value, str):
        return _file(Path(value)) if IMAGE_FILE.search(value) else value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            return _plain(value["bytes"] or value["path"])
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return ["bytes", blake2b(value, digest_size=8).hexdigest()]
    if isinstance(value, Image.Image):
        return [value.mode, *value.size, _plain(value.tobytes())]
    if isinstance(value, Tensor):
        value = value.cpu().numpy()
    if isinstance(value, np.ndarray | np.generic):
        return [str(value.dtype), list(value.shape), _plain(value.tobytes())]
    # an object's own representation says where in memory it is
    return type(value).__name__ if type(value).__repr__ is object.__repr__ else repr(value)


def _file(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return [path.name, path.stat().st_size, _plain(file.read(FILE_BYTES))]
    except (OSError, ValueError):  # no file, but a text that ends as one
        return str(path)
