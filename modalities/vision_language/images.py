"""Images of an example: reading and replacing them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ...images import open_image
from ...trajectory import Example

CARRIERS = ("image", "path", "url")
"""Keys of a chat's image part that may hold its image."""

MARKERS = re.compile(r"<image>|<\|vision_start\|><\|image_pad\|><\|vision_end\|>")
"""Markers of an image in a text, in LLaVA's data sets and in Qwen's."""


def images_of(example: Example) -> list[Image.Image]:
    """Opens the example's images by `open_image`; an empty list where it has none.

    Raises:
        ValueError: an image can't be read; otherwise as in `values_of`.
    """
    values = values_of(example)
    return [_numbered(value, i, len(values)) for i, value in enumerate(values, 1)]


def values_of(example: Example) -> list[Any]:
    """Collects the values of an example's images, unread.

    They are in the column ``images``, else ``image``, else in the image parts of the prompt, as one of `CARRIERS`.

    Raises:
        ValueError: ``images`` is no list, ``image`` is one, or an image part is written in another form.
    """
    if example.get("images"):
        values = example["images"]
        if not isinstance(values, list | tuple):
            raise ValueError(f"images is no list: {type(values).__name__}; a single image belongs into image")
        return list(values)
    if example.get("image") is not None:
        values = [example["image"]]
        if isinstance(values[0], list | tuple):
            raise ValueError(f"image is a list: of {len(values[0])}; several images belong into images")
        return values
    return [value for part in image_parts(example["prompt"]) if (value := _carried(part)) is not None]


def with_images(example: Example, images: list[Image.Image]) -> Example:
    """Copies an example with these images in place of its own.

    One image stays in ``image`` where it was there, otherwise they are in ``images``. A prompt that places its images
    by parts or `MARKERS` keeps one place per image: new ones follow its last one, those that are too many go from the
    end. What the parts carried themselves is dropped.
    """
    single = example.get("image") is not None and not example.get("images") and len(images) == 1
    rest = {name: value for name, value in example.items() if name not in ("image", "images")}
    columns = {"image": images[0]} if single else {"images": list(images)}
    return {**rest, **columns, "prompt": _placed(example["prompt"], len(images))}


def image_parts(prompt: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lists the image parts of a chat, in order; none of a prompt that is text.

    Raises:
        ValueError: a part is written the way of an API (``image_url``), which chat templates do not read.
    """
    parts = [part for message in prompt if isinstance(message, Mapping) for part in _parts(message)]
    if any(part.get("type") in ("image_url", "input_image") for part in parts):
        raise ValueError("an image part is written in another form: {type: image_url}; write {type: image, image: …}")
    return [part for part in parts if part.get("type") == "image"]


def split_at_markers(text: str, own: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Splits a text into the parts of a content: text, and an image or video in place of each marker.

    Args:
        text: with `MARKERS` in it, or without.
        own: further markers: those of the model itself.
    """
    marker = re.compile("|".join((MARKERS.pattern, "<video>", *map(re.escape, own))))
    parts: list[dict[str, Any]] = []
    end = 0
    for match in marker.finditer(text):
        parts += [{"type": "text", "text": text[end : match.start()]}] if match.start() > end else []
        parts.append({"type": "video" if match[0] == "<video>" else "image"})
        end = match.end()
    return [*parts, {"type": "text", "text": text[end:]}] if end < len(text) or not parts else parts


def _numbered(value: Any, number: int, of: int) -> Image.Image:
    try:
        return open_image(value)
    except ValueError as error:
        raise ValueError(f"{error} (image {number} of {of})" if of > 1 else str(error)) from error


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _carried(part: dict[str, Any]) -> Any:
    return next((part[key] for key in CARRIERS if part.get(key) is not None), None)


def _placed(prompt: str | list[dict[str, Any]], images: int) -> str | list[dict[str, Any]]:
    texts = [prompt] if isinstance(prompt, str) else [text for message in prompt for text in _texts(message)]
    places = len(image_parts(prompt)) + sum(len(MARKERS.findall(text)) for text in texts)
    number = itertools.count(1)

    def copies() -> int:
        """Counts the images at the next place: one, but for the last place, which gets the rest."""
        index = next(number)
        return 0 if index > images else 1 if index < places else images - places + 1

    def in_text(text: str) -> str:
        return MARKERS.sub(lambda marker: marker[0] * copies(), text)

    def in_part(part: dict[str, Any]) -> list[dict[str, Any]]:
        if part.get("type") == "image":
            return [{"type": "image"}] * copies()
        return [{**part, "text": in_text(part["text"])}] if isinstance(part.get("text"), str) else [part]

    if not places:
        return prompt
    if isinstance(prompt, str):
        return in_text(prompt)
    placed = []
    for message in prompt:
        content = message.get("content")
        if isinstance(content, str):
            message = {**message, "content": in_text(content)}
        elif isinstance(content, list):
            message = {**message, "content": [new for part in content for new in in_part(part)]}
        placed.append(message)
    return placed


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in _parts(message) if isinstance(part.get("text"), str)]
