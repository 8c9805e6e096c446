"""Boxes ``[x1, y1, x2, y2]`` in pixels of the original image, from its top left corner; x2 and y2 are exclusive."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

SLACK = 1.0
"""Pixels by which a box may overlap the image's edge: annotations are rounded."""


def problem_with_box(box: Any, size: tuple[int, int]) -> str | None:
    """Finds what is wrong with a box in an image of ``size`` (width, height); None if nothing is.

    Separate messages: not four finite numbers, no area, outside of the image, and other conventions as far as the
    numbers show them: fractions of the image, thousandths of it, [x, y, width, height].
    """
    width, height = size
    if not _is_four_numbers(box):
        return f"the box is not four finite numbers [x1, y1, x2, y2]: {box!r}"
    x1, y1, x2, y2 = box
    if all(0 <= value <= 1 for value in box) and min(size) > 1:
        return f"the box looks normalized to 0…1: {box}; pixels are needed: multiply by {width} and {height}"
    if x2 <= x1 or y2 <= y1:
        if x1 != x2 and y1 != y2 and min(x2, y2) > 0 and _is_inside((x1, y1, x1 + x2, y1 + y2), size):
            return f"the box looks like [x, y, width, height]: {box}; [x1, y1, x2, y2] is needed"
        return f"the box has no area: {box}; x1 < x2 and y1 < y2 are needed"
    if not _is_inside((x1, y1, x2, y2), size):
        thousandths = min(x1, y1) >= 0 and max(x2, y2) <= 1000
        hint = "; is it in thousandths of the image? Pixels are needed" if thousandths else ""
        return f"the box is out of the image: {box} in {width} × {height} pixels{hint}"
    return None


def _is_four_numbers(box: Any) -> bool:
    return (
        isinstance(box, list | tuple)
        and len(box) == 4
        and all(isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) for value in box)
    )


def _is_inside(box: tuple[float, float, float, float], size: tuple[int, int]) -> bool:
    return all(
        -SLACK <= low < length and 0 < high <= length + SLACK
        for low, high, length in zip(box[:2], box[2:], size, strict=True)
    )
