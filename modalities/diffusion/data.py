"""Images with captions: scikit-learn's digits, and local folders."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from ...data_source import json_lines, local_path
from ...rows import BadRows
from ...table import kind, tabulate

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 16


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits need scikit-learn: pip install 'opd-lightning[vision]'") from error
    found = load_digits()
    return found.images, found.target


def caption(label: int) -> str:
    return f"a handwritten {NAMES[label]}"


def digits(
    held_out: bool = False,
    inverted: float = 0.0,
    referenced: float = 0.0,
    limit: int | None = None,
    repeat: int = 1,
    seed: int = 0,
) -> Dataset:
    """scikit-learn's 1,797 real digits of 8 × 8 pixels, smoothly enlarged to 16 × 16, white on black.

    Columns: ``prompt`` (a caption, such as "a handwritten three"), ``image``, ``label``, and ``reference``: another
    digit in the same colors, or none.

    Args:
        held_out: the last fifth (by index, which is by writer) instead of the rest.
        inverted: the share of images in black on white, of those that have a reference (of all, where none has);
            captions do not say so.
        referenced: the share of rows with a reference.
        limit: at most so many.
        repeat: each of them so many times.
        seed: which ones are inverted and have a reference.
    """
    images, labels = _digits()
    first = len(images) * 4 // 5
    chosen = range(first, len(images)) if held_out else range(first)
    draw = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for i in list(chosen)[:limit] * repeat:
        told, other = draw.random() < referenced, int(draw.integers(chosen.start, chosen.stop))
        flip, label = draw.random() < inverted and (told or not referenced), int(labels[i])
        reference = _picture(images[other], flip) if told else None
        rows.append(
            {"prompt": caption(label), "image": _picture(images[i], flip), "label": label, "reference": reference}
        )
    kinds = {"prompt": Value("string"), "image": ImageFeature(), "label": Value("int64"), "reference": ImageFeature()}
    return Dataset.from_list(rows, features=Features(kinds))


def _picture(pixels: np.ndarray, inverted: bool) -> Image.Image:
    small = Image.fromarray(np.clip(pixels * 255 / 16, 0, 255).astype(np.uint8))
    enlarged = np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return Image.fromarray(255 - enlarged if inverted else enlarged).convert("RGB")


def image_folder(
    folder: str, captions: str = "metadata.jsonl", on_bad_row: Literal["refuse", "skip"] = "refuse"
) -> Dataset:
    """Images of a local folder with their captions.

    Columns: ``prompt``, ``image``, and whatever else the rows have.

    Args:
        folder: holds the images.
        captions: a JSONL file in it whose rows have ``file_name`` and ``prompt`` (or ``text``).
        on_bad_row: what becomes of a row without them, or whose image is not there. Default in a configuration:
            ``data.on_bad_row``.

    Raises:
        ValueError: a bad row where these are refused; the message names it.
    """
    root = local_path(folder)
    table = root / captions
    if table.suffix != ".jsonl":
        raise ValueError(f"captions is {captions!r}; it must be a .jsonl file, whose rows say file_name and prompt")
    if not table.is_file():
        raise ValueError(f"{root}: there is no {captions}, whose rows say file_name and prompt of each image")
    bad, rows = BadRows(str(table), on_bad_row), []
    for number, row in json_lines(table, bad):
        with bad.at(f"{table}, row {number}"):
            rows.append((f"{table}, row {number}", _captioned(row, root)))
    found = tabulate(rows, str(table), bad)
    bad.warn()
    if not len(found):
        raise ValueError(f"{table}: no row is left" + (f"; the first was left out: {bad.first}" if bad.first else ""))
    return found.cast_column("image", ImageFeature())


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
