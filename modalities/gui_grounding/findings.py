"""What `opd check` finds in boxes: the unit that they look like, and a picture of the first one."""

from __future__ import annotations

from pathlib import Path

from PIL import ImageDraw

from ...finding import Finding
from ...trajectory import Example
from ..vision_language.images import images_of

THOUSANDTHS = 1000
CLEAR = 1.25
"""Factor by which images must be larger than 1000 pixels before boxes that stay below it are doubted; chosen."""


def boxes(examples: list[Example], folder: Path) -> Finding:
    """Judges the unit of boxes, which a row alone may not show, and draws the first into ``folder``/box.png.

    Fractions, [x, y, width, height] and boxes outside of their image are refused with their row.
    """
    # 1. a picture
    image = images_of(examples[0])[0].copy()
    ImageDraw.Draw(image).rectangle(list(examples[0]["box"]), outline="red", width=max(2, min(image.size) // 200))
    folder.mkdir(parents=True, exist_ok=True)
    image.save(path := folder / "box.png")
    # 2. the unit: thousandths of a screen that is larger fit into it as pixels do
    sizes = [images_of(row)[0].size for row in examples]
    reach = max(max(row["box"]) for row in examples)
    shares = [(b[2] - b[0]) * (b[3] - b[1]) / (w * h) for (w, h), b in _pairs(sizes, examples)]
    text = (
        f"pixels of images of up to {max(w for w, _ in sizes)} × {max(h for _, h in sizes)}, on average "
        f"{sum(shares) / len(shares):.1%} of the screen; the first is drawn in {path}"
    )
    if reach <= THOUSANDTHS and max(map(max, sizes)) >= CLEAR * THOUSANDTHS and len(examples) > 1:
        advice = f"no box reaches beyond {reach:g}: are they thousandths? Multiply by the image's size / 1000"
        return Finding("boxes", "doubtful", text, advice)
    return Finding("boxes", "good", text)


def _pairs(sizes: list[tuple[int, int]], examples: list[Example]) -> list[tuple[tuple[int, int], list[float]]]:
    return list(zip(sizes, [row["box"] for row in examples], strict=True))
