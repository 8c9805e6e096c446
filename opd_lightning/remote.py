"""Files elsewhere, by fsspec: ``s3://…``, ``gs://…``, ``memory://…`` and whatever else a package of it provides."""

from __future__ import annotations

import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import fsspec

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(path: Any) -> bool:
    """Tells whether a path names its file system."""
    return _URL.match(str(path)) is not None


def is_web(path: Any) -> bool:
    """Tells whether a path is a page's, which can be read and not written."""
    return str(path).startswith(("http://", "https://"))


def refuse_url(key: str, path: Any, why: str) -> None:
    """Refuses a URL where a folder of this machine is needed.

    Raises:
        ValueError: it is one; the message says ``why``.
    """
    if path is not None and is_url(path):
        raise ValueError(f"{key}: {path} is no folder of this machine, which is needed: {why}")


def join(folder: str, name: str) -> str:
    """Joins a folder, of this machine or elsewhere, and a name."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


def parent(path: str) -> str:
    """Returns the folder of a file, of this machine or elsewhere, in one spelling."""
    return path.rpartition("/")[0].rstrip("/") if is_url(path) else str(Path(path).resolve().parent)


def exists(url: str) -> bool:
    """Tells whether there is such a file or folder.

    Raises:
        ValueError: nobody knows this file system, or its package is missing.
    """
    files, path = _found(url)
    return bool(files.exists(path))


def is_whole(url: str) -> bool:
    """Tells whether a checkpoint is not cut short; reads its end."""
    files, path = _found(url)
    with files.open(path, "rb") as file:
        return zipfile.is_zipfile(file)


def move(path: str, to: str) -> None:
    """Moves a file within its file system, over one that is there."""
    if is_url(path):
        files, inside = _found(path)
        files.mv(inside, _found(to)[1])
    else:
        os.replace(path, to)


@contextmanager
def copied(url: str) -> Iterator[Path]:
    """Copies a file to this machine, until it was used."""
    files, path = _found(url)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder, url.rpartition("/")[2])
        files.get_file(path, str(here))
        yield here


def kept_copy(url: str, folder: Path) -> Path:
    """Copies a file to this machine, once for each of its versions; all ranks may ask at the same time.

    Args:
        url: of the file.
        folder: that holds the copies.

    Raises:
        ValueError: there is no such file, or it is a folder.
    """
    files, path = _found(url)
    if not files.isfile(path):
        what = "is a folder: name one file of it" if files.isdir(path) else "is not there"
        raise ValueError(f"{url} {what}")
    version = sha256(f"{url} {files.ukey(path)}".encode()).hexdigest()[:32]
    here = folder / version / url.rpartition("/")[2]
    if not here.exists():
        here.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=here.parent)
        os.close(handle)
        files.get_file(path, partial)
        os.replace(partial, here)
    return here


def set_checkpoints_aside(folder: str) -> str | None:
    """Moves an earlier run's checkpoints into ``<folder>/earlier-<n>``; returns that, None where there are none."""
    files, path = _found(folder)
    left = files.glob(f"{path.rstrip('/')}/*.ckpt")
    if not left:
        return None
    apart = next(name for n in count(1) if not files.exists(name := f"{path.rstrip('/')}/earlier-{n}"))
    files.makedirs(apart)
    for file in left:
        files.mv(file, f"{apart}/{file.rpartition('/')[2]}")
    return join(folder, apart.rpartition("/")[2])


def _found(url: str) -> tuple[Any, str]:
    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url}: {error}") from None
    # what another process wrote since
    files.invalidate_cache()
    return files, path
