"""ImageData: `PromptData` for rows that hold images."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, concatenate_datasets

from ...data import BadRows, PromptData, Split
from ...data_source import LOCATION, is_local
from ...images import is_url, open_image
from .images import CARRIERS

FETCH_SECONDS = 30
FETCH_BYTES = 100 * 2**20
FETCHES_AT_ONCE = 16


class ImageData(PromptData):
    """Prompt data whose rows name images by path or URL, or store them.

    Examples hold images as `open_image` reads them: a path, or {bytes, path}. They are decoded when they are needed,
    so that a broken one is a bad row like any other.

    Args:
        image_folder: where relative paths start. Default: the folder of the source where it is a file or a folder,
            otherwise the working directory.
        allow_urls: whether images named by an http(s) URL are fetched, once, before training; what can't be fetched
            makes a bad row. Default: every such row is a bad row.
        image_columns: columns that hold an image or a list of images, in sources that have them. Image parts of a
            chat in `prompt` are always looked at.
        cache_folder: where fetched images are kept, each named by the SHA-256 of its URL. Default:
            `opd-lightning/images` in the user's cache folder.
        **kwargs: as in `PromptData`.

    Raises:
        ValueError: as in `PromptData`; image_folder is no folder.
    """

    def __init__(
        self,
        *args: Any,
        image_folder: str | None = None,
        allow_urls: bool = False,
        image_columns: tuple[str, ...] = ("image", "images", "image_full"),
        cache_folder: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if image_folder is not None and not Path(image_folder).expanduser().is_dir():
            raise ValueError(f"data.image_folder is {image_folder!r}, which is no folder")
        self.image_folder, self.allow_urls, self.image_columns = image_folder, allow_urls, tuple(image_columns)
        self.cache_folder = Path(cache_folder).expanduser() if cache_folder else user_cache()

    def prepare_data(self) -> None:
        """Downloads, once per machine; what could not be fetched in an earlier run is tried again."""
        if not self.allow_urls:
            super().prepare_data()
            return
        for split, source in self._sources.items():
            if isinstance(source, str):
                self._read_source(split, try_again=True)

    def _read_source(self, split: Split, try_again: bool = False) -> Dataset:
        rows = super()._read_source(split)
        named = [name for name in ("prompt", *self.image_columns) if name in rows.column_names]
        values = {name: rows[name][:] for name in named if not _stores_bytes(rows, name)}
        if self.allow_urls:
            rows, values = self._fetched(split, rows, values, try_again)
        folder = self._folder(self._sources[split])

        def found(name: str) -> str:
            return name if is_url(name) else str(folder / os.path.expanduser(name))

        for name, old in values.items():
            new = [_renamed(name, value, found) for value in old]
            if new != rows[name][:]:
                column = Dataset.from_dict({name: new}, features=Features({name: rows.features[name]}))
                rows = concatenate_datasets([rows.remove_columns(name), column], axis=1)
        return rows

    def _fetched(
        self, split: Split, rows: Dataset, values: dict[str, list[Any]], try_again: bool
    ) -> tuple[Dataset, dict[str, list[Any]]]:
        """Selects the rows whose URLs could all be fetched, and replaces URLs in their values by paths."""
        of_row = [[url for name in values for url in _urls(name, values[name][i])] for i in range(len(rows))]
        paths, problems = self._fetch({url for urls in of_row for url in urls}, try_again)
        bad = self._skipped[f"{split}, fetching"] = BadRows(f"data.{split}", self.on_bad_row)
        indices = []
        for index, (location, urls) in enumerate(zip(rows[LOCATION], of_row, strict=True)):
            reason = next((problems[url] for url in urls if url in problems), None)
            if reason is None:
                indices.append(index)
            else:
                bad(location, reason)
        bad.warn()
        if not indices:
            raise ValueError(f"data.{split}: no row is left; no image could be fetched ({bad.first})")
        fetched = {
            name: [_renamed(name, column[index], lambda text: paths.get(text, text)) for index in indices]
            for name, column in values.items()
        }
        return (rows if len(indices) == len(rows) else rows.select(indices).flatten_indices()), fetched

    def _fetch(self, urls: Iterable[str], try_again: bool) -> tuple[dict[str, str], dict[str, str]]:
        """Fetches URLs; returns the paths of images by URL, and the reasons of failures by URL."""
        paths, problems = {}, {}

        def one(url: str) -> None:
            try:
                paths[url] = str(fetch(url, self.cache_folder, try_again))
            except ValueError as error:
                problems[url] = str(error)

        with ThreadPoolExecutor(FETCHES_AT_ONCE) as pool:
            list(pool.map(one, urls))
        return paths, problems

    def _folder(self, source: str) -> Path:
        if self.image_folder is not None:
            return Path(self.image_folder).expanduser()
        path = Path(source).expanduser()
        if not is_local(source):
            return Path()
        return path if path.is_dir() else path.parent


def fetch(url: str, folder: Path, try_again: bool = False) -> Path:
    """Returns the file of the image at a URL, and fetches it if it is not there yet.

    Args:
        url: http or https.
        folder: the cache. It also remembers failures, so that all processes agree on them.
        try_again: fetch again where it failed before.

    Raises:
        ValueError: it can't be fetched, or is no image.
    """
    file = folder / hashlib.sha256(url.encode()).hexdigest()
    failed = file.with_suffix(".failed")
    if file.is_file():
        return file
    if failed.is_file() and not try_again:
        raise ValueError(failed.read_text(encoding="utf-8"))
    try:
        content = _download(url)
        open_image(content)
    except (OSError, HTTPException, ValueError) as error:
        reason = f"the image can't be fetched: {url[:200]}: {error}"
        _write(failed, reason.encode())
        raise ValueError(reason) from error
    _write(file, content)
    failed.unlink(missing_ok=True)
    return file


def user_cache() -> Path:
    """Returns the folder for fetched images in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "opd-lightning" / "images"


def _stores_bytes(rows: Dataset, column: str) -> bool:
    return "binary" in str(rows.features.arrow_schema.field(column).type)


def _renamed(column: str, value: Any, change: Callable[[str], str]) -> Any:
    """Changes every path or URL in the value of an image column, or in a prompt."""
    if column != "prompt":
        return _changed(value, change)
    if not isinstance(value, list):
        return value
    return [
        {**message, "content": [_changed_part(part, change) for part in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in value
    ]


def _changed_part(part: Any, change: Callable[[str], str]) -> Any:
    if not isinstance(part, dict) or part.get("type") != "image":
        return part
    return {key: _changed(value, change) if key in CARRIERS else value for key, value in part.items()}


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(inner, change) for inner in value]
    if isinstance(value, dict) and isinstance(value.get("path"), str) and value.get("bytes") is None:
        return {**value, "path": change(value["path"])}
    return value


def _urls(column: str, value: Any) -> list[str]:
    urls: list[str] = []

    def note(text: str) -> str:
        if is_url(text):
            urls.append(text)
        return text

    _renamed(column, value, note)
    return urls


def _download(url: str) -> bytes:
    if not url.startswith(("http://", "https://")):
        raise ValueError("only http and https are fetched")
    request = urllib.request.Request(url, headers={"User-Agent": "opd-lightning"})
    with urllib.request.urlopen(request, timeout=FETCH_SECONDS) as answer:
        content: bytes = answer.read(FETCH_BYTES + 1)
    if len(content) > FETCH_BYTES:
        raise ValueError(f"it has more than {FETCH_BYTES // 2**20} MiB")
    return content


def _write(file: Path, content: bytes) -> None:
    """Writes all of a file or nothing, also where several processes write the same one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as partial:
        partial.write(content)
    os.replace(partial.name, file)
