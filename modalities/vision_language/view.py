"""Views of images: more of them for a teacher, less of them for a student.

`box` is in pixels of the example's first image, as the data set has it. A view that cuts or resizes that image moves
`box` along, so that views can be chained in any order. Gold answers and reasoning need no class of their own:
`PromptView` writes them into the prompt and leaves the images where they are.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

from PIL import Image, ImageColor, ImageFilter

from ...images import open_image
from ...policy import Original, View
from ...trajectory import Example
from .boxes import problem_with_box
from .images import images_of, with_images


class Crop(View):
    """View of the region in the column `box` in place of the image (Vision-OPD, 2605.18740); none without a box.

    Args:
        margin: what is added on each side, as a share of the box's width and height, up to the image's edge.
            Default 0.1, a choice of this library: Vision-OPD's data set holds crops that were cut in advance (see
            `ColumnImages`) and does not say how widely.
        size: pixels of the crop's longer side after resizing; None: as it was cut.
        keep_original: show the whole image, then the crop.

    Raises:
        ValueError: margin < 0 or size < 1; when called, a box that `problem_with_box` refuses, or a row without images.
    """

    def __init__(self, margin: float = 0.1, size: int | None = None, keep_original: bool = False) -> None:
        if margin < 0:
            raise ValueError(f"Crop.margin is {margin}; it is a share of the box and must be at least 0")
        _positive("Crop.size", size)
        self.margin, self.size, self.keep_original = margin, size, keep_original
        self.columns = ("box",)

    def __call__(self, example: Example) -> Example | None:
        if example.get("box") is None:
            return None
        first, *rest = _images("Crop", example)
        x1, y1, x2, y2 = box = _box(example, first)
        dx, dy = self.margin * (x2 - x1), self.margin * (y2 - y1)
        region = _pixels((x1 - dx, y1 - dy, x2 + dx, y2 + dy), first.size)
        crop = first.crop(region)
        resized = crop if self.size is None else crop.resize(_fitting(crop.size, self.size), Image.Resampling.BICUBIC)
        if self.keep_original:
            return with_images(example, [first, resized, *rest])
        cropped = with_images(example, [resized, *rest])
        left, top = region[:2]
        return cropped | {"box": _scaled((box[0] - left, box[1] - top, box[2] - left, box[3] - top), crop, resized)}


class Resize(View):
    """Every image scaled so that its longer side has `longest` pixels, up or down; more pixels are more tokens.

    Raises:
        ValueError: longest < 1; when called, a row without images or with a box that `problem_with_box` refuses.
    """

    def __init__(self, longest: int) -> None:
        _positive(f"{type(self).__name__}.longest", longest)
        self.longest = longest

    def __call__(self, example: Example) -> Example:
        return _resized(example, [self._resize(image) for image in _images(type(self).__name__, example)])

    def _resize(self, image: Image.Image) -> Image.Image:
        return image.resize(_fitting(image.size, self.longest), Image.Resampling.BICUBIC)


class Downscale(Resize):
    """For a student: `Resize` for images whose longer side exceeds `longest` pixels; smaller ones stay as they are."""

    def _resize(self, image: Image.Image) -> Image.Image:
        return super()._resize(image) if max(image.size) > self.longest else image


class HighResolution(View):
    """View of the same picture with more pixels, from another column; none where that column is empty.

    It takes the place of the first image, and `box` is scaled to it.

    Args:
        column: default `image_full`.

    Raises:
        ValueError: when called, the column's image has another aspect ratio than the first image, by more than
            rounding to pixels explains.
    """

    def __init__(self, column: str = "image_full") -> None:
        self.column = column
        self.columns = (column,)

    def __call__(self, example: Example) -> Example | None:
        if example.get(self.column) is None:
            return None
        first, *rest = _images("HighResolution", example)
        large = open_image(example[self.column])
        if abs(large.width * first.height - first.width * large.height) > max(large.size) + max(first.size):
            raise ValueError(
                f"{self.column} is not the same picture as the first image: {large.width} × {large.height} pixels, "
                f"and {first.width} × {first.height}"
            )
        return _resized(example, [large, *rest])


class ColumnImages(View):
    """View of the images of another column, such as crops cut in advance; none where it is empty.

    The shown example has no `box`.

    Args:
        column: it holds an image or a list of images; `ImageData` finds their paths if its image_columns name it.
    """

    def __init__(self, column: str) -> None:
        self.column = column
        self.columns = (column,)

    def __call__(self, example: Example) -> Example | None:
        value = example.get(self.column)
        if value is None or value == []:
            return None
        images = [open_image(one) for one in (value if isinstance(value, list | tuple) else [value])]
        return with_images(example, images) | ({"box": None} if "box" in example else {})


class Cue(View):
    """View with a cue after the question: a text, an image or both (ViCuR, 2606.05718).

    An empty cue changes nothing: that example is distilled as without this view. ViCuR's own student has an added
    module that recovers the cue, which is no part of a view.

    Args:
        column: the text, appended to the last message as a paragraph of its own; None: no text.
        image_column: an image that follows the example's own; None: no image.

    Raises:
        ValueError: neither column is named.
    """

    def __init__(self, column: str | None = "cue", image_column: str | None = None) -> None:
        if column is None and image_column is None:
            raise ValueError("Cue needs a column or an image_column")
        self.column, self.image_column = column, image_column
        self.columns = tuple(name for name in (column, image_column) if name is not None)

    def __call__(self, example: Example) -> Example:
        cued = example
        if self.image_column is not None and example.get(self.image_column) is not None:
            cued = with_images(cued, [*images_of(cued), open_image(cued[self.image_column])])
        if self.column is not None and example.get(self.column):
            cued = {**cued, "prompt": _followed(cued["prompt"], f"\n\n{cued[self.column]}")}
        return cued


class Blur(View):
    """For a student: every image blurred, its size unchanged.

    Args:
        radius: standard deviation of the Gaussian, in pixels.

    Raises:
        ValueError: radius <= 0; when called, a row without images.
    """

    def __init__(self, radius: float) -> None:
        if radius <= 0:
            raise ValueError(f"Blur.radius is {radius} pixels; it must be greater than 0")
        self.filter = ImageFilter.GaussianBlur(radius)

    def __call__(self, example: Example) -> Example:
        return with_images(example, [image.filter(self.filter) for image in _images("Blur", example)])


class MaskRegion(View):
    """For a student: the region in the column `box` painted over, the size unchanged; no view without a box.

    Args:
        color: what it is painted with, as PIL names colors; default a middle gray.

    Raises:
        ValueError: no such color; when called, a box that `problem_with_box` refuses, or a row without images.
    """

    columns = ("box",)

    def __init__(self, color: str = "#7f7f7f") -> None:
        self.color = ImageColor.getrgb(color)

    def __call__(self, example: Example) -> Example | None:
        if example.get("box") is None:
            return None
        first, *rest = _images("MaskRegion", example)
        masked = first.copy()
        masked.paste(self.color, _pixels(_box(example, first), first.size))
        return with_images(example, [masked, *rest])


class Mixture(View):
    """Mixture of views: one for a share of the examples, another for the rest.

    A student that is warm-started on both can later be its own teacher through the first.

    Which examples is decided by a hash of their texts, numbers and box, so it is the same in every epoch.

    Args:
        view: for ``share`` of the examples.
        otherwise: for the others; None: as they are.
        share: in [0, 1].

    Raises:
        ValueError: share is out of range.
    """

    def __init__(self, view: View, otherwise: View | None = None, share: float = 0.5) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"Mixture.share is {share}; it must be in [0, 1]")
        self.view, self.otherwise, self.share = view, otherwise or Original(), share
        self.columns = tuple(dict.fromkeys((*view.columns, *self.otherwise.columns)))

    def __call__(self, example: Example) -> Example | None:
        plain = [(n, example[n]) for n in sorted(example) if n == "box" or isinstance(example[n], str | int | float)]
        chosen = zlib.crc32(repr(plain).encode()) < self.share * 2**32
        return (self.view if chosen else self.otherwise)(example)


class Compose(View):
    """Composition of views, each applied to the result of the one before it; no view where one of them has none.

    Raises:
        ValueError: the list is empty.
    """

    def __init__(self, views: list[View]) -> None:
        if not views:
            raise ValueError("Compose.views is empty; name at least one view")
        self.views = views
        self.columns = tuple(dict.fromkeys(column for view in views for column in view.columns))

    def __call__(self, example: Example) -> Example | None:
        composed: Example | None = example
        for view in self.views:
            if composed is None:
                return None
            composed = view(composed)
        return composed


def _positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value} pixels; it must be at least 1")


def _images(who: str, example: Example) -> list[Image.Image]:
    images = images_of(example)
    if not images:
        raise ValueError(f"{who} needs an image: the row has none")
    return images


def _box(example: Example, image: Image.Image) -> tuple[float, float, float, float]:
    box = example["box"]
    if reason := problem_with_box(box, image.size):
        raise ValueError(reason)
    x1, y1, x2, y2 = box
    return max(0, x1), max(0, y1), min(image.width, x2), min(image.height, y2)


def _pixels(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the pixels of the image that a box touches, as a box of integers."""
    x1, y1, x2, y2 = box
    return max(0, math.floor(x1)), max(0, math.floor(y1)), min(size[0], math.ceil(x2)), min(size[1], math.ceil(y2))


def _fitting(size: tuple[int, int], longest: int) -> tuple[int, int]:
    scale = longest / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _scaled(box: Any, before: Image.Image, after: Image.Image) -> list[float]:
    scale = after.width / before.width, after.height / before.height
    return [value * scale[i % 2] for i, value in enumerate(box)]


def _resized(example: Example, images: list[Image.Image]) -> Example:
    """Replaces the example's images by resized ones, and scales its box to pixels of the new first one."""
    resized = with_images(example, images)
    if example.get("box") is None:
        return resized
    first = images_of(example)[0]
    return resized | {"box": _scaled(_box(example, first), first, images[0])}


def _followed(prompt: str | list[dict[str, Any]], text: str) -> str | list[dict[str, Any]]:
    if isinstance(prompt, str):
        return prompt + text
    *before, last = prompt
    content = last["content"]
    longer = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return [*before, {**last, "content": longer}]
