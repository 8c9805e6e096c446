"""Small scenes of handwritten digits: real images that ship with scikit-learn, with questions, boxes and scene graphs.

>>> row = scenes(1, kinds=["which"])[0]
>>> row["prompt"], row["answer"], row["image"].size
('Which digit is in the green frame?', '4', (112, 112))
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

COLORS = {"red": (220, 40, 40), "green": (30, 150, 60), "blue": (40, 80, 220), "yellow": (240, 190, 0)}
QUESTIONS = {
    "which": "Which digit is in the {color} frame?",
    "where": "Where is the {digit}?",
    "count": "How many digits are there?",
    "sum": "What is the sum of the two digits?",
}
_TILE = 8  # of the ground, pixels
_LINE = 2  # of a frame, pixels
_GAP = 1  # between a frame and its digit, and between two frames


def scenes(
    count: int,
    seed: int = 0,
    held_out: bool = False,
    kinds: Sequence[str] = ("which", "which", "which", "where", "count", "sum"),
    size: int = 112,
    digit: tuple[int, int] = (10, 14),
    digits: tuple[int, int] = (2, 4),
    noise: float = 0.15,
    cells: int | None = None,
) -> list[dict[str, Any]]:
    """Draws `count` scenes: framed digits on a light ground of colored tiles, and a question about each scene.

    The same arguments make the same scenes, byte by byte, and row i is the same for every `count`. A fifth of the
    1797 handwritten samples, chosen by a hash of their index, is drawn in held-out scenes only, the others in
    training scenes only. (The 13 writers of the samples are in both.)

    Args:
        count: number of rows.
        seed: of everything that is drawn.
        held_out: whether to draw the held-out samples.
        kinds: categories to draw from; one that is named twice is drawn twice as often.
        size: side of the square scene, pixels.
        digit: smallest and largest side of a digit, pixels; its frame adds 3 on each side. With the default, a
            classifier (SVM) of the digits in their frames is right for 97 % of held-out ones as they are, and for
            52 % in scenes shrunk to 32 pixels, 89 % if it was trained on shrunk scenes: what there is to learn.
        digits: fewest and most digits in a scene; scenes with the question `sum` have two.
        noise: how far the colors of the ground's tiles vary, as a share of their range; 0 is plain.
        cells: frames lie anywhere within the cells of a grid of cells × cells, one in each; None: wherever they do not
            touch. Where a cell is what one image token sees, a small model learns to read much faster.

    Returns rows of
        prompt: the question;
        image: the scene, a PIL image of size × size pixels;
        box: the region that is enough to answer it: the frame (`which`), the box around all digits (`count`,
            `sum`), the whole scene (`where`), in pixels;
        answer: a digit or a number; "top left", "top right", "bottom left" or "bottom right" for `where`;
        cue: what is to be seen, in words: every frame with its digit and its place;
        category: the kind of question;
        scene: the scene graph as JSON, ``{"size", "digits": [{"digit", "color", "box", "sample"}, …]}``; a `box` is
            that of the frame, a `sample` the index in scikit-learn's data set;
        completion: the answer.

    Raises:
        ValueError: an unknown kind, more digits than colors or cells, or digits too large for the scene or a cell.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    if not kinds or not set(kinds) <= set(QUESTIONS):
        raise ValueError(f"scenes: kinds is {list(kinds)}; name some of {', '.join(QUESTIONS)}")
    if not 1 <= digits[0] <= digits[1] <= len(COLORS):
        raise ValueError(f"scenes: digits is {digits}; it must be a range within 1 and {len(COLORS)}")
    if not 1 <= digit[0] <= digit[1] or 3 * _side(digit[1]) > size:
        raise ValueError(
            f"scenes: digit is {digit}; it must be a range of pixels, and three frames of {_side(digit[1])} pixels "
            f"must fit into the scene's {size}"
        )
    if cells is not None and (digits[1] > cells**2 or _side(digit[1]) > size // cells):
        raise ValueError(
            f"scenes: {cells} × {cells} cells of {size // cells} pixels hold no {digits[1]} frames of up to "
            f"{_side(digit[1])} pixels"
        )
    return [
        _scene(random.Random(f"{seed} {held_out} {i}"), held_out, kinds, size, digit, digits, noise, cells)
        for i in range(count)
    ]


def is_held_out(sample: int) -> bool:
    """Tells whether a sample of scikit-learn's digits belongs to the held-out fifth."""
    return zlib.crc32(str(sample).encode()) % 5 == 0


def _scene(
    draw: random.Random,
    held_out: bool,
    kinds: Sequence[str],
    size: int,
    digit: tuple[int, int],
    digits: tuple[int, int],
    noise: float,
    cells: int | None,
) -> dict[str, Any]:
    # 1. digits, and the places of their frames
    kind = draw.choice(kinds)
    number = 2 if kind == "sum" else draw.randint(*digits)
    values = [draw.randrange(10) for _ in range(number)]
    if kind == "where":
        values = [values[0], *(draw.choice([v for v in range(10) if v != values[0]]) for _ in values[1:])]
    sides = [draw.randint(*digit) for _ in values]
    corners = _corners(draw, [_side(side) for side in sides], size, cells, aside=kind == "where")
    drawn: list[dict[str, Any]] = [
        {"digit": value, "color": color, "box": [x, y, x + _side(side), y + _side(side)], "sample": sample}
        for value, color, side, (x, y), sample in zip(
            values,
            draw.sample(list(COLORS), number),
            sides,
            corners,
            [draw.choice(_samples()[held_out, value]) for value in values],
            strict=True,
        )
    ]
    # 2. question, answer and picture
    asked = drawn[0]
    answer = {
        "which": str(asked["digit"]),
        "where": _place(asked["box"], size),
        "count": str(number),
        "sum": str(sum(values)),
    }[kind]
    around = {"which": asked["box"], "where": [0, 0, size, size]}.get(kind) or _union([frame["box"] for frame in drawn])
    order = sorted(drawn, key=lambda frame: (frame["box"][1], frame["box"][0]))
    return {
        "prompt": QUESTIONS[kind].format(**asked),
        "image": _render(draw, drawn, size, noise),
        "box": around,
        "answer": answer,
        "cue": " ".join(
            f"The {frame['color']} frame at the {_place(frame['box'], size)} holds a {frame['digit']}."
            for frame in order
        ),
        "category": kind,
        "scene": json.dumps({"size": size, "digits": order}),
        "completion": answer,
    }


def _corners(draw: random.Random, sides: list[int], size: int, cells: int | None, aside: bool) -> list[tuple[int, int]]:
    """Draws top left corners of squares that do not touch; `aside`: the first one lies clearly in one quarter."""
    while True:  # rejection sampling
        if cells is not None:
            width = size // cells
            chosen = draw.sample([(width * i, width * j) for i in range(cells) for j in range(cells)], len(sides))
            places = [
                (x + draw.randint(0, width - side), y + draw.randint(0, width - side))
                for (x, y), side in zip(chosen, sides, strict=True)
            ]
            if not aside or _is_aside(places[0], sides[0], size):
                return places
            continue
        corners: list[tuple[int, int]] = []
        for side in sides:
            x, y = draw.randint(0, size - side), draw.randint(0, size - side)
            if any(
                x < u + other + _GAP and u < x + side + _GAP and y < v + other + _GAP and v < y + side + _GAP
                for (u, v), other in zip(corners, sides, strict=False)
            ):
                break
            corners.append((x, y))
        else:
            if not aside or _is_aside(corners[0], sides[0], size):
                return corners


def _is_aside(corner: tuple[int, int], side: int, size: int) -> bool:
    return all(abs(c + side / 2 - size / 2) >= size / 10 for c in corner)


def _render(draw: random.Random, drawn: list[dict[str, Any]], size: int, noise: float) -> Image.Image:
    cells = max(1, size // _TILE)
    colors = np.frombuffer(draw.randbytes(3 * cells * cells), np.uint8).reshape(cells, cells, 3)
    tint = [draw.randint(200, 235) for _ in range(3)]
    tiles = (tint + (colors - 127.5) * noise).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(tiles).resize((size, size), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for frame in drawn:
        x1, y1, x2, y2 = frame["box"]
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), outline=COLORS[frame["color"]], width=_LINE)
        inside = x2 - x1 - 2 * (_LINE + _GAP)
        ink = Image.fromarray(_digits()[frame["sample"]]).resize((inside, inside), Image.Resampling.BICUBIC)
        shade = tuple(draw.randrange(60) for _ in range(3))
        image.paste(shade, (x1 + _LINE + _GAP, y1 + _LINE + _GAP), ink)
    return image


def _side(digit: int) -> int:
    return digit + 2 * (_LINE + _GAP)


def _place(box: list[int], size: int) -> str:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return f"{'top' if y < size / 2 else 'bottom'} {'left' if x < size / 2 else 'right'}"


def _union(boxes: list[list[int]]) -> list[int]:
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    return [min(x1), min(y1), max(x2), max(y2)]


@cache
def _load() -> Any:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The scenes need the package scikit-learn: pip install "opd-lightning[vision]"'
        ) from error
    return load_digits()


@cache
def _digits() -> NDArray[np.uint8]:
    """Loads the digits ``[1797, 8, 8]``, 255 where the pen was."""
    return np.round(_load().images * (255 / 16)).astype(np.uint8)


@cache
def _samples() -> dict[tuple[bool, int], list[int]]:
    """Lists the indices of samples by (held out, digit)."""
    indices: dict[tuple[bool, int], list[int]] = {}
    for sample, value in enumerate(_load().target):
        indices.setdefault((is_held_out(sample), int(value)), []).append(sample)
    return indices
