"""Every setting reads images in one way: whatever the file, upright, in RGB, or an error that names it."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from opd_lightning.images import as_stored, open_image
from opd_lightning.table import tabulate, undecoded

RED = Image.new("RGB", (4, 3), "red")
WHITE = (255, 255, 255)


def encoded(image: Image.Image = RED, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode == "RGB" and one.size == other.size and one.tobytes() == other.tobytes()


def pixels(value: Any) -> list[tuple[int, ...]]:
    """Of the first row."""
    image = open_image(value)
    assert image.mode == "RGB"
    return [image.getpixel((x, 0)) for x in range(image.width)]  # type: ignore[misc]


def test_an_image_is_opened_from_each_form(tmp_path: Path) -> None:
    file = tmp_path / "red.png"
    file.write_bytes(encoded())
    forms: list[Any] = [RED, file, str(file), encoded(), {"bytes": encoded(), "path": None}]
    forms += [{"bytes": None, "path": str(file)}, {"bytes": encoded(), "path": "gone.png"}, RED.convert("P")]
    assert all(same(open_image(form), RED) for form in forms)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO"])
def test_formats_go_by_their_content(kind: str, tmp_path: Path) -> None:
    (tmp_path / "image.jpg").write_bytes(encoded(RED, kind))
    assert np.abs(np.asarray(open_image(tmp_path / "image.jpg")).astype(int) - np.asarray(RED)).max() <= 2


# -- orientation --------------------------------------------------------------------------------------------------


def noted(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


CORNERS = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)  # each is where it is by its number
TURNED = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_what_the_camera_noted_is_applied_once(orientation: int, kind: str) -> None:
    exact = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(Image.fromarray(CORNERS), kind, exif=noted(orientation), **exact)
    found = open_image(file)
    assert np.asarray(found)[..., 0].tolist() == TURNED.get(orientation, CORNERS.tolist())
    assert same(open_image(found), found)
    assert same(open_image(Image.open(io.BytesIO(file))), found)


def test_a_note_that_can_not_be_read_turns_nothing() -> None:
    assert same(open_image(encoded(RED, exif=b"\xff" * 20)), RED)


def png(depth: int, kind: int, row: bytes, transparent: bytes) -> bytes:
    """Of one pixel, as PIL does not write it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, depth, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"tRNS", transparent) + pixels + chunk(b"IEND", b"")


# -- colors ------------------------------------------------------------------------------------------------------


def palette(**options: Any) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return encoded(image, **options)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (1, 1), (255, 0, 0, 128)), (255, 127, 127)),
        (Image.new("LA", (1, 1), (0, 0)), WHITE),
        (Image.new("La", (1, 1)), WHITE),
        (Image.new("RGBa", (1, 1)), WHITE),
        (Image.new("PA", (1, 1)), WHITE),
        (encoded(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3)), WHITE),
        (encoded(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(3, 2, 1)), (1, 2, 3)),
        (encoded(Image.new("L", (1, 1), 7), transparency=7), WHITE),
        (encoded(Image.fromarray(np.array([[500]], np.uint16)), transparency=500), WHITE),
        (png(2, 0, b"\x40", b"\0\x01"), WHITE),
        (png(4, 0, b"\x50", b"\0\x05"), WHITE),
        (png(4, 0, b"\x50", b"\0\x04"), (85, 85, 85)),
        (png(16, 2, b"\3\0\4\0\5\0", b"\3\0\4\0\5\0"), WHITE),
        (png(16, 2, b"\0\7\0\7\0\7", b"\0\7\0\7\0\7"), WHITE),
        (palette(transparency=0), WHITE),
        (palette(transparency=b"\x80\xff"), (255, 127, 127)),
        (palette(kind="GIF", transparency=0), WHITE),
    ],
)
def test_transparency_is_white(image: Any, expected: tuple[int, ...]) -> None:
    assert pixels(image)[0] == expected


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (palette(), [(255, 0, 0), (0, 0, 255)]),
        (Image.new("1", (1, 1), 1), [WHITE]),
        (Image.new("L", (1, 1), 77), [(77, 77, 77)]),
        (encoded(Image.new("CMYK", (8, 1), (0, 255, 255, 0)), "JPEG"), [(255, 0, 0)] * 8),
        (encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [(255, 0, 0)]),
        (Image.new("YCbCr", (1, 1), (255, 128, 128)), [WHITE]),
        (Image.new("HSV", (1, 1), (0, 255, 255)), [(255, 0, 0)]),
        (Image.new("LAB", (1, 1), (255, 128, 128)), [WHITE]),
    ],
)
def test_every_mode_becomes_rgb(image: Any, expected: list[tuple[int, ...]]) -> None:
    assert np.abs(np.array(pixels(image)) - np.array(expected)).max() <= 1


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (np.uint16, [0, 77 * 257, 65535]),
        (">u2", [0, 77 * 257, 65535]),
        (np.int32, [0, 77, 255]),
        (np.int32, [0, 77 * 257, 65535]),
        (np.int32, [0, round(77 / 255 * (2**31 - 1)), 2**31 - 1]),
        (np.float32, [0, 77 / 255, 1]),
        (np.float32, [0, 77, 255]),
        (np.float32, [0, 77 * 257, 65535]),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
def test_more_than_eight_bits_are_scaled_not_cut_off(kind: Any, values: list[float], stored: bool) -> None:
    deep = Image.fromarray(np.array([values], kind))
    assert pixels(encoded(deep, "TIFF") if stored else deep) == [(0, 0, 0), (77, 77, 77), WHITE]


@pytest.mark.parametrize("values", [[-1, 9], [0, 2.0**17], [0, float("nan")], [0, float("inf")]])
def test_values_without_a_scale_are_refused(values: list[float]) -> None:
    with pytest.raises(
        ValueError, match=r"values from .* to .*, which have no scale: .*between 0 and 1 or 255 or 65535"
    ):
        open_image(Image.fromarray(np.array([values], np.float32)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    file = encoded(RED, kind, save_all=True, append_images=[Image.new("RGB", RED.size, "lime")])
    assert pixels(file)[0][0] > 250


# -- stored in a table --------------------------------------------------------------------------------------------


def photo(kind: str) -> Image.Image:
    return Image.open(io.BytesIO(encoded(Image.effect_noise((8, 4), 60).convert("RGB"), kind, exif=noted(6))))


@pytest.mark.parametrize(
    "image",
    [
        photo("JPEG"),
        photo("PNG"),
        photo("TIFF"),
        *(Image.new(mode, (2, 2)) for mode in ("HSV", "La", "PA", "CMYK", "F")),
    ],
    ids=lambda image: f"{image.format} {image.mode}",
)
def test_an_image_that_a_function_gives_is_stored_as_it_is_shown(image: Image.Image) -> None:
    chat = [{"role": "user", "content": [{"type": "image", "image": image}]}]
    rows = tabulate([("row 1", {"image": image, "images": [RED, image], "prompt": chat})], "data.train")
    (row,) = undecoded(rows)
    for stored in (row["image"], row["images"][1], row["prompt"][0]["content"][0]["image"]):
        assert same(open_image(stored), open_image(image))


def test_an_image_that_was_not_read_yet_is_stored_as_its_path(tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    unread, changed = (Image.open(tmp_path / "red.png") for _ in range(2))
    changed.thumbnail((2, 2))
    assert as_stored([unread]) == [{"bytes": None, "path": str(tmp_path / "red.png")}]
    assert open_image(as_stored(changed)).size == (2, 2)


def test_what_can_not_be_stored_names_its_row() -> None:
    rows = [("row 1", {"image": RED}), ("row 2", {"image": Image.fromarray(np.array([[-1.0]], np.float32))})]
    with pytest.raises(ValueError, match=r"row 2: .*values from -1 to -1, which have no scale"):
        tabulate(rows, "data.train")


# -- what is refused ----------------------------------------------------------------------------------------------

HALF = encoded()[:50]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no/such.png", r"there is no image file: no/such\.png"),
        ("~no-such-user/such.png", r"there is no image file: ~no-such-user/such\.png"),
        (os.fspath(Path.cwd()), r"there is no image file"),
        ("iVBORw0KGgo" * 100, r"there is no image file: iVBORw0KGgo"),
        ("https://example.org/a.png", r"the image is a URL: https://example\.org/a\.png; .*allow_urls"),
        ("file:///etc/hosts", r"the image is a URL: file:"),
        ("data:image/png;base64,AAAA", r"the image is a URL: data:image"),
        (b"nonsense", r"this is no image of a known format \(PNG, JPEG, WEBP, GIF, BMP, TIFF\): 8 bytes"),
        (b"", r"this is no image of a known format .*: 0 bytes"),
        (encoded(RED, "PPM"), r"this is no image of a known format"),
        (encoded(RED, "JPEG2000"), r"this is no image of a known format"),
        (Image.open(io.BytesIO(encoded(RED, "PPM"))), r"the image is a PPM; save it as one of PNG, "),
        (Image.new("RGB", (0, 3)), r"the image has no pixels"),
        (HALF, r"the image is broken: \d+ bytes: "),
        ({"bytes": HALF, "path": "half.png"}, r"the image is broken: half\.png: "),
        ({"bytes": None, "path": None}, r"the image is of the wrong kind: dict"),
        ({"bytes": "text", "path": "a.png"}, r"the image is of the wrong kind: dict"),
        ({"bytes": None, "path": 7}, r"the image is of the wrong kind: int"),
        (7, r"the image is of the wrong kind: int; it must be a PIL image, a path, bytes"),
    ],
)
def test_what_is_no_image_is_named(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_image(value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore")
def test_whatever_a_decoder_raises_is_an_error_that_names_the_image(kind: str) -> None:
    draw, whole = random.Random(kind), encoded(Image.effect_noise((16, 16), 50).convert("RGB"), kind)
    for _ in range(150):
        damaged = bytearray(whole[: draw.choice([len(whole), draw.randrange(len(whole))])])
        for _ in range(draw.randrange(8) if damaged else 0):
            damaged[draw.randrange(min(len(damaged), 200))] = draw.randrange(256)
        try:
            found = open_image(bytes(damaged)).mode
        except ValueError as error:
            found = str(error)
        assert found == "RGB" or f"{len(damaged)} bytes" in found


@pytest.mark.parametrize("limit", [5, 11])
def test_an_image_too_large_to_open_is_named(limit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "big.png"
    file.write_bytes(encoded())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # PIL raises above twice as many, and warns above it
    with pytest.raises(ValueError, match=r"too many pixels to be opened safely: .*big\.png: .*limit"):
        open_image(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert same(open_image(file), RED)


def test_an_image_of_a_row_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "gs"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/started\necho 10.0\n', encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "page.png").write_bytes(page)
    for value in (tmp_path / "page.png", page, {"bytes": page, "path": "page.png"}, Image.open(io.BytesIO(page))):
        with pytest.raises(ValueError, match=r"no image of a known format|the image is a EPS"):
            open_image(value)
    assert not (tmp_path / "started").exists()
