"""Views for GUI grounding: the same screenshot, which shows where the target is (GUI-SD, 2605.00642).

`box` is the target in pixels of the example's first image. Images keep their size, so that the teacher's has as many
image tokens as the student's and a coordinate means the same place to both (`CropZoom` breaks the second on purpose).
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from ...policy import View
from ...trajectory import Example
from ..autoregressive.view import last_text, with_text
from ..vision_language.boxes import problem_with_box
from ..vision_language.images import images_of, with_images

Box = tuple[float, float, float, float]

HINT = "Hint: what you are looking for is inside the {color} rectangle."
TOLD = "Hint: it is at ({x}, {y}), from 0 to 1000 across the image."


class BoxOnly(View):
    """View of a rectangle around the target, with a hint after the prompt; none without a box.

    A side of the rectangle that would lie outside of the screenshot is not seen.

    Args:
        color: as PIL names colors. Default green, as in GUI-SD's code (a reading of the paper has red).
        width: of the rectangle's line, in pixels; it lies just outside of the box. Default 5 (GUI-SD).
        hint: appended to the last message on a line of its own, with ``{color}``; empty: no hint.

    Raises:
        ValueError: no such color, width < 1, a hint with other braces; when called, a row without images or with a
            box that `problem_with_box` refuses.
    """

    columns = ("box",)
    marks: ClassVar[bool] = True
    """It draws on observed images, too, that have a box (`seen_by`)."""

    def __init__(self, color: str = "green", width: int = 5, hint: str = HINT) -> None:
        if width < 1:
            raise ValueError(f"{type(self).__name__}.width is {width} pixels; it must be at least 1")
        self.color, self.width = ImageColor.getrgb(color), width
        self.hint = _filled(f"{type(self).__name__}.hint", hint, color=color)

    def __call__(self, example: Example) -> Example | None:
        if example.get("box") is None:
            return None
        (first, *rest), target = _target(self, example)
        canvas, box = self._shown(first, target)
        ImageDraw.Draw(canvas).rectangle(self._outline(box), outline=self.color, width=self.width)
        return with_images(_told(example, self.hint), [canvas, *rest]) | {"box": list(box)}

    def _shown(self, image: Image.Image, box: Box) -> tuple[Image.Image, Box]:
        """Returns a new image to draw on, and the target's box in it."""
        return image.copy(), box

    def _outline(self, box: Box) -> tuple[int, int, int, int]:
        """Returns the outermost pixels of the rectangle, inclusive."""
        x1, y1, x2, y2 = box
        return (
            math.floor(x1) - self.width,
            math.floor(y1) - self.width,
            math.ceil(x2) - 1 + self.width,
            math.ceil(y2) - 1 + self.width,
        )


class Spotlight(BoxOnly):
    """View of `BoxOnly` on a screenshot that darkens away from the target, GUI-SD's view: pixels × exp(−d² / 2σ²).

    d is a pixel's distance to the box, 0 inside; σ = max(sigma · the box's longer side, √min_area · the image's shorter
    side).

    Args:
        color: as in `BoxOnly`.
        width: as in `BoxOnly`.
        hint: as in `BoxOnly`.
        sigma: default 1.5 (GUI-SD).
        min_area: default 0.1 (GUI-SD).

    Raises:
        ValueError: sigma or min_area < 0, or both 0; otherwise as in `BoxOnly`.
    """

    def __init__(
        self,
        color: str = "green",
        width: int = 5,
        hint: str = HINT,
        sigma: float = 1.5,
        min_area: float = 0.1,
    ) -> None:
        super().__init__(color, width, hint)
        if min(sigma, min_area) < 0 or sigma == min_area == 0:
            raise ValueError(f"Spotlight: sigma and min_area must be >= 0 and not both 0, got {sigma} and {min_area}")
        self.sigma, self.min_area = sigma, min_area

    def _shown(self, image: Image.Image, box: Box) -> tuple[Image.Image, Box]:
        x1, y1, x2, y2 = box
        sigma = max(self.sigma * max(x2 - x1, y2 - y1), math.sqrt(self.min_area) * min(image.size))
        # the Gaussian of a distance in the plane is the product of those along the axes
        across, down = _falloff(image.width, x1, x2, sigma), _falloff(image.height, y1, y2, sigma)
        pixels = np.array(image)
        for row, dimmed in zip(pixels, down, strict=True):  # a whole screenshot of floats is slow to allocate
            row[:] = np.rint(row * (across * dimmed)[:, None])
        return Image.fromarray(pixels), box


class CropZoom(BoxOnly):
    """View of `BoxOnly` on the surroundings of the target alone. An ablation.

    Magnified, they are resized to the screenshot's size, with its aspect ratio. Image tokens then agree with the
    student's, but coordinates do not: the teacher scores the student's answer as a place in the magnified picture, and
    teaches it wrong ones. In place, as in GUI-SD's code, everything around them is black, and coordinates agree.

    Args:
        color: as in `BoxOnly`.
        width: as in `BoxOnly`.
        hint: as in `BoxOnly`.
        margin: context on each side, as a share of the box's width and height. Default 1.5 (GUI-SD, "adaptive").
        min_area: the least that is shown, as a share of the screenshot's area. Default 0.1 (GUI-SD).
        magnify: default True.

    Raises:
        ValueError: margin < 0, or min_area outside [0, 1]; otherwise as in `BoxOnly`.
    """

    def __init__(
        self,
        color: str = "green",
        width: int = 5,
        hint: str = HINT,
        margin: float = 1.5,
        min_area: float = 0.1,
        magnify: bool = True,
    ) -> None:
        super().__init__(color, width, hint)
        if margin < 0:
            raise ValueError(f"CropZoom.margin is {margin}; it is a share of the box and must be at least 0")
        if not 0 <= min_area <= 1:
            raise ValueError(f"CropZoom.min_area is {min_area}; it is a share of the screenshot and must be in [0, 1]")
        self.margin, self.min_area, self.magnify = margin, min_area, magnify

    def _shown(self, image: Image.Image, box: Box) -> tuple[Image.Image, Box]:
        window = self._window(image.size, box)
        if not self.magnify:
            canvas = Image.new("RGB", image.size)
            canvas.paste(image.crop(window), window[:2])
            return canvas, box
        left, top, right, bottom = window
        scale = image.width / (right - left), image.height / (bottom - top)
        x1, y1, x2, y2 = box
        moved = (x1 - left) * scale[0], (y1 - top) * scale[1], (x2 - left) * scale[0], (y2 - top) * scale[1]
        return image.resize(image.size, Image.Resampling.BICUBIC, box=window), moved

    def _window(self, size: tuple[int, int], box: Box) -> tuple[int, int, int, int]:
        """Returns the pixels around the box that have the screenshot's aspect ratio, shifted into it."""
        lengths = box[2] - box[0], box[3] - box[1]
        needed = (length * (1 + 2 * self.margin) / full for length, full in zip(lengths, size, strict=True))
        scale = min(1.0, max(math.sqrt(self.min_area), *needed))
        shape = [math.ceil(full * scale) for full in size]
        starts = [
            min(max(0, round((box[axis] + box[axis + 2] - shape[axis]) / 2)), size[axis] - shape[axis])
            for axis in (0, 1)
        ]
        return starts[0], starts[1], starts[0] + shape[0], starts[1] + shape[1]


class CoordinatesAsText(View):
    """View with the target's center, from 0 to 1000, in the prompt: naive OPSD, for comparison; none without a box.

    A teacher that reads the answer need not look. GUI-SD (2605.00642) measures a teacher entropy of .17 with the
    coordinates as text against .50 with a visual cue: it is as certain as a label, and self-distillation degrades to
    SFT. Settings warn of views with ``tells_the_answer``.

    Args:
        text: appended to the last message on a line of its own, with ``{x}`` and ``{y}``.

    Raises:
        ValueError: a text with other braces; when called, as in `BoxOnly`.
    """

    columns = ("box",)
    tells_the_answer: ClassVar[bool] = True

    def __init__(self, text: str = TOLD) -> None:
        _filled("CoordinatesAsText.text", text, x=0, y=0)
        self.text = text

    def __call__(self, example: Example) -> Example | None:
        if example.get("box") is None:
            return None
        images, (x1, y1, x2, y2) = _target(self, example)
        width, height = images[0].size
        x, y = round(500 * (x1 + x2) / width), round(500 * (y1 + y2) / height)
        return _told(example, self.text.format(x=x, y=y))


def _target(view: View, example: Example) -> tuple[list[Image.Image], Box]:
    """Returns the example's images, and the box in the first of them."""
    images = images_of(example)
    if not images:
        raise ValueError(f"{type(view).__name__} needs an image: the row has none")
    if reason := problem_with_box(example["box"], images[0].size):
        raise ValueError(reason)
    x1, y1, x2, y2 = example["box"]
    return images, (x1, y1, x2, y2)


def _told(example: Example, text: str) -> Example:
    """Appends a line to the prompt's text."""
    if not text:
        return example
    prompt = example["prompt"]
    longer = f"{last_text(prompt)}\n{text}"
    return {**example, "prompt": longer if isinstance(prompt, str) else [*prompt[:-1], with_text(prompt[-1], longer)]}


def _falloff(length: int, low: float, high: float, sigma: float) -> np.ndarray:
    """Computes exp(−d² / 2σ²) ``[length]`` of the distance d of pixel centers to an interval."""
    at = np.arange(length, dtype=np.float32) + 0.5
    gap = np.maximum(np.maximum(low - at, at - high), 0) / sigma
    return np.exp(-(gap**2) / 2, dtype=np.float32)


def _filled(name: str, template: str, **values: object) -> str:
    try:
        return template.format(**values)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        places = " and ".join(f"{{{value}}}" for value in values)
        raise ValueError(f"{name} is no template with {places}: {template!r}: {error!r}") from None
