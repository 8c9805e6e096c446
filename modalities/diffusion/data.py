"""Images with captions, from local folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from datasets import Image as ImageFeature

from ...data_source import json_lines, local_path
from ...rows import BadRows
from ...shipped import shipped
from ...table import kind, tabulate


def image_folder(
    folder: str, captions: str = "metadata.jsonl", on_bad_row: Literal["refuse", "skip"] = "refuse"
) -> Dataset:
    """Images of a local folder with their captions.

    Columns: ``prompt``, ``image``, and whatever else the rows have.

    Args:
        folder: holds the images; ``opd:assets/…`` for one that ships.
        captions: a JSONL file in it whose rows have ``file_name`` and ``prompt`` (or ``text``).
        on_bad_row: handling of a row without them, or whose image is not there. Default in a configuration:
            ``data.on_bad_row``.

    Raises:
        ValueError: a bad row where these are refused; the message names it.
    """
    root = local_path(shipped(folder))
    table = root / captions
    if table.suffix != ".jsonl":
        raise ValueError(f"captions is {captions!r}; it must be a .jsonl file, whose rows say file_name and prompt")
    if not table.is_file():
        raise ValueError(f"{root}: there is no {captions}, whose rows say file_name and prompt of each image")
    bad, rows = BadRows(str(table), on_bad_row), []
    for number, row in json_lines(table, bad):
        with bad.at(f"{table}, row {number}"):
            rows.append((f"{table}, row {number}", _captioned(row, root)))
    dataset = tabulate(rows, str(table), bad)
    bad.warn()
    if not len(dataset):
        raise ValueError(f"{table}: no row is left" + (f"; the first was left out: {bad.first}" if bad.first else ""))
    return dataset.cast_column("image", ImageFeature())


def _captioned(row: Any, root: Path) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"not an object but {kind(row)}: it needs file_name and prompt")
    rest = {column: value for column, value in row.items() if column != "image"}
    name = rest.pop("file_name", None)
    prompt = rest.pop("prompt", None) or rest.pop("text", None)
    if not name or not prompt:
        raise ValueError("it needs file_name and prompt")
    for column, value in (("file_name", name), ("prompt", prompt)):
        if not isinstance(value, str):
            raise ValueError(f"{column} is {kind(value)}; it must be text")
    if not (root / name).is_file():
        raise ValueError(f"there is no image {root / name}")
    return {"prompt": prompt, "image": str(root / name), **rest}
