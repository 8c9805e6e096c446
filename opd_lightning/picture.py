"""Picture: what a setting adds to the report of a run, an image with places marked in it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

from PIL import Image

LARGEST = 640
"""Pixels of the longer side of an image in a report."""
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """Image with a title, places and words.

    Attributes:
        title: above it.
        image: pixels.
        target: a rectangle ``x1, y1, x2, y2`` in pixels of the image; None: there is none.
        before, after: where the student pointed before and after training, ``x, y`` in the same pixels.
        words: lines below it.
    """

    title: str
    image: Image.Image
    target: Box | None = None
    before: tuple[float, float] | None = None
    after: tuple[float, float] | None = None
    words: list[str] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        return self.image.size

    @property
    def mark(self) -> float:
        """Half the width of a cross, in pixels of the image."""
        return max(self.size) / 40

    def data_uri(self) -> str:
        """Encodes the image, as `data_uri` does."""
        return data_uri(self.image)


def data_uri(image: Image.Image) -> str:
    """Encodes an image as PNG, or as JPEG where that is much smaller, at most `LARGEST` pixels a side."""
    image = image.convert("RGB")
    image.thumbnail((LARGEST, LARGEST))
    encoded = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        buffer = io.BytesIO()
        image.save(buffer, kind.upper(), **options)
        encoded[kind] = buffer.getvalue()
    kind = "jpeg" if 3 * len(encoded["jpeg"]) < len(encoded["png"]) else "png"
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"


def from_data_uri(uri: str) -> Image.Image:
    """Decodes what `data_uri` encoded."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
