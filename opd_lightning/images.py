"""Images of rows: upright, in RGB, and from formats whose decoders start no program."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are read, by content. PIL has others that start a program of the machine (EPS: Ghostscript)."""

_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HOLDS_IMAGES = (Image.Image, dict, list, tuple)
_WHITES = {"I": [255, 2**16 - 1, 2**31 - 1], "F": [1, 255, 2**16 - 1]}


def open_image(value: Any) -> Image.Image:
    """Reads an image in RGB, upright (EXIF orientation applied), pixels loaded; of an animation the first frame.

    Transparency becomes white. More than 8 bits are scaled: 16 bits by their range, whole numbers of 32 bits and
    fractions by the smallest of 1 (fractions only), 255, 2¹⁶ − 1 and 2³¹ − 1 (whole numbers only) that holds them all.

    Args:
        value: a PIL image, a path, the bytes of an image file, or {bytes, path}, as `datasets` stores one.

    Raises:
        ValueError: there is no such file, it is none of `FORMATS` or a broken one, it has no pixels or more than
            ``PIL.Image.MAX_IMAGE_PIXELS`` (default 89 million), its values have no scale, it is a URL, or the value is
            something else.
    """
    source, name = _source(value)
    with _naming(name):
        if isinstance(source, Image.Image):
            return _read(source, name)
        with Image.open(source, formats=FORMATS) as image:
            return _read(image, name)


def as_stored(value: Any) -> Any:
    """Replaces the PIL images in a row's value by {bytes, path}.

    `datasets` would store them without their orientation, JPEGs with a second loss, and some modes not at all.

    Raises:
        ValueError: as `open_image`.
    """
    if isinstance(value, dict):
        return {name: as_stored(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return (
            [as_stored(inner) for inner in value] if any(isinstance(inner, _HOLDS_IMAGES) for inner in value) else value
        )
    if not isinstance(value, Image.Image):
        return value
    if getattr(value, "filename", "") and getattr(value, "tile", ()):  # opened and not read yet, so nobody changed it
        return {"bytes": None, "path": os.path.abspath(value.filename)}  # type: ignore[attr-defined]
    file = io.BytesIO()
    open_image(value).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def is_url(text: str) -> bool:
    """Tells whether a text is a URL rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", text) is not None


def _source(value: Any) -> tuple[Image.Image | str | io.BytesIO, str]:
    """Returns a source that PIL opens, and its name for messages."""
    if isinstance(value, Image.Image):
        return value, "a PIL image"
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return io.BytesIO(value["bytes"]), str(value.get("path") or f"{len(value['bytes'])} bytes")[:500]
    if isinstance(value, Mapping) and value.get("bytes") is None and value.get("path"):
        value = value["path"]
    if isinstance(value, bytes):
        return io.BytesIO(value), f"{len(value)} bytes"
    if isinstance(value, str) and is_url(value):
        raise ValueError(
            f"the image is a URL: {value[:200]}; download it and name the file, or let ImageData do so "
            "(data.allow_urls: true)"
        )
    if not isinstance(value, str | os.PathLike):
        raise ValueError(
            f"the image is of the wrong kind: {type(value).__name__}; it must be a PIL image, a path, bytes, "
            "or {bytes, path}"
        )
    path = os.path.expanduser(value)
    if not os.path.isfile(path):  # that of a pathlib.Path raises for a name that is too long
        where = "" if os.path.isabs(path) else f" (from {os.getcwd()})"
        raise ValueError(f"there is no image file: {str(path)[:500]}{where}")
    return path, str(path)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Adds the image's name to errors that are raised within.

    Raises:
        ValueError: in place of any other error.
    """
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(f"this is no image of a known format ({', '.join(FORMATS)}): {name}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(name, str(error))) from error
    except _Unusable as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # decoders of foreign bytes raise whatever they come upon
        raise ValueError(f"the image is broken: {name}: {error or type(error).__name__}") from error


class _Unusable(Exception):
    """Refusal of an image that could be read."""


def _too_large(name: str, size: str) -> str:
    return (
        f"the image has too many pixels to be opened safely: {name}: {size}. Shrink it, or raise "
        "PIL.Image.MAX_IMAGE_PIXELS where the file is trusted"
    )


def _read(image: Image.Image, name: str) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS  # from which on PIL itself only warns
    if limit is not None and image.width * image.height > limit:
        raise _Unusable(_too_large(name, f"{image.width} × {image.height} pixels, the limit is {limit}"))
    if image.format not in (None, "MPO", *FORMATS):  # MPO: a JPEG with further ones behind it
        raise _Unusable(f"the image is a {image.format}; save it as one of {', '.join(FORMATS)}")
    if 0 in image.size:
        raise _Unusable(f"the image has no pixels: {name}")
    stored = _stored_mode(image)
    image.load()
    turn = _TURNS.get(_orientation(image))
    if image.mode == "RGB" and turn is None and not image.has_transparency_data:
        return image
    upright = _rgb(image, stored, name)
    if turn is not None:
        upright = upright.transpose(turn)
    upright.info = {}  # what was applied must not be applied again
    return upright


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # as viewers do: what can't be read turns nothing
        return None


def _stored_mode(image: Image.Image) -> str:
    """Returns PIL's name of the file's values, such as "L;4" for 4 bits of gray; empty if they were read already."""
    tiles = getattr(image, "tile", ())
    return tiles[0][3] if image.format == "PNG" and tiles and isinstance(tiles[0][3], str) else ""


def _rgb(image: Image.Image, stored: str, name: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _scaled(image, name)
    if not image.has_transparency_data:
        return image.convert("RGB")
    transparent = image.info.get("transparency")
    # PIL makes 8 bits of a PNG's 2, 4 or 16, and leaves the color that is transparent as it is
    if isinstance(transparent, tuple) and (stored == "RGB;16B" or max(transparent) > 255):
        transparent = tuple(value >> 8 for value in transparent)
    elif isinstance(transparent, int) and stored in ("L;2", "L;4"):
        transparent *= 85 if stored == "L;2" else 17
    if transparent != image.info.get("transparency"):
        image = image.copy()
        image.info["transparency"] = transparent
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _scaled(image: Image.Image, name: str) -> Image.Image:
    """Scales more than 8 bits of gray to 8; converting alone would cut values off at 255."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    whites = _WHITES.get(image.mode, [2**16 - 1])
    white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is None:
        raise _Unusable(
            f"the image holds values from {low:g} to {high:g}, which have no scale: {name}; write them between 0 and "
            f"{' or '.join(map(str, whites))}"
        )
    gray = np.rint(values * (255 / white)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return Image.fromarray(gray).convert("RGB")
