"""The quickstart's images with captions: scikit-learn's digits."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 16


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits need scikit-learn: pip install 'opd-lightning[vision]'") from error
    dataset = load_digits()
    return dataset.images, dataset.target


def caption(label: int) -> str:
    """Writes the caption of a digit."""
    return f"a handwritten {NAMES[label]}"


def digits(
    held_out: bool = False,
    inverted: float = 0.0,
    referenced: float = 0.0,
    limit: int | None = None,
    repeat: int = 1,
    seed: int = 0,
) -> Dataset:
    """Loads scikit-learn's 1,797 real digits of 8 × 8 pixels, smoothly enlarged to 16 × 16, white on black.

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
        has_reference, source = draw.random() < referenced, int(draw.integers(chosen.start, chosen.stop))
        flip, label = draw.random() < inverted and (has_reference or not referenced), int(labels[i])
        reference = _picture(images[source], flip) if has_reference else None
        rows.append(
            {"prompt": caption(label), "image": _picture(images[i], flip), "label": label, "reference": reference}
        )
    kinds = {"prompt": Value("string"), "image": ImageFeature(), "label": Value("int64"), "reference": ImageFeature()}
    return Dataset.from_list(rows, features=Features(kinds))


def _picture(pixels: np.ndarray, inverted: bool) -> Image.Image:
    small = Image.fromarray(np.clip(pixels * 255 / 16, 0, 255).astype(np.uint8))
    enlarged = np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return Image.fromarray(255 - enlarged if inverted else enlarged).convert("RGB")
