"""The images of an example: where they are found, how they are replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from ...images import open_image
from ...trajectory import Example

CARRIERS = ("image", "path", "url")
"""Where an image part of a chat may hold its image."""


def images_of(example: Example) -> list[Image.Image]:
    """The example's images, as `open_image` gives them: the column ``images``, else ``image``, else those that the
    image parts of the prompt carry under ``image``, ``path`` or ``url``; none where there are none.

    Raises:
        ValueError: an image can't be read, or an image part is written in another form.
    """
    if example.get("images"):
        values = example["images"]
        if not isinstance(values, list | tuple):
            raise ValueError(f"images is no list: {type(values).__name__}; a single image belongs into image")
    elif example.get("image") is not None:
        values = [example["image"]]
        if isinstance(values[0], list | tuple):
            raise ValueError(f"image is a list: of {len(values[0])}; several images belong into images")
    else:
        values = [value for part in image_parts(example["prompt"]) if (value := _carried(part)) is not None]
    return [_numbered(value, i, len(values)) for i, value in enumerate(values, 1)]


def with_images(example: Example, images: list[Image.Image]) -> Example:
    """The example with these images in place of its own; the example itself is left as it is.

    One image stays in ``image`` where it was there, otherwise they are in ``images``. A chat that places its images
    by parts keeps one part per image: new ones follow its last one, those that are too many go from the end. What
    the parts carried themselves is dropped.
    """
    single = example.get("image") is not None and not example.get("images") and len(images) == 1
    rest = {name: value for name, value in example.items() if name not in ("image", "images")}
    found = {"image": images[0]} if single else {"images": list(images)}
    return {**rest, **found, "prompt": _placed(example["prompt"], len(images))}


def image_parts(prompt: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The image parts of a chat, in order; none of a prompt that is text.

    Raises:
        ValueError: a part is written the way of an API (``image_url``), which chat templates do not read.
    """
    parts = [part for message in prompt if isinstance(message, Mapping) for part in _parts(message)]
    if any(part.get("type") in ("image_url", "input_image") for part in parts):
        raise ValueError("an image part is written in another form: {type: image_url}; write {type: image, image: …}")
    return [part for part in parts if part.get("type") == "image"]


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
    parts = len(image_parts(prompt))
    if not parts:
        return prompt
    assert isinstance(prompt, list)
    placed, seen = [], 0
    for message in prompt:
        content = message.get("content")
        if isinstance(content, list):
            kept = []
            for part in content:
                if part.get("type") != "image":
                    kept.append(part)
                    continue
                seen += 1
                here = max(0, images - parts) + 1 if seen == parts else 1
                kept += [{"type": "image"}] * (here if seen <= images else 0)
            message = {**message, "content": kept}
        placed.append(message)
    return placed
