"""Places of images in chats: contents as lists of parts, with one image part for each image."""

from __future__ import annotations

from typing import Any

from ...chat import Chat
from ...printable import quoted
from ...trajectory import Example
from .images import split_at_markers, values_of


def marks_of(processor: Any) -> tuple[str, ...]:
    """Lists what a processor itself reads as images in a text."""
    return tuple(token for name in ("image_token", "boi_token") if (token := getattr(processor, name, None)))


def mark_of(processor: Any) -> str:
    """Returns what a chat template writes for an image, which the processor replaces."""
    return str(getattr(processor, "boi_token", None) or processor.image_token)


def placed_images(chat: Chat, example: Example, own: tuple[str, ...] = ()) -> Chat:
    """Converts contents of a chat to lists of parts, with one image part for each image of the row.

    Where the texts hold `MARKERS`, an image's place is there; a chat that says no places has them at the beginning of
    its first user message.

    Args:
        chat: of the row.
        example: the row.
        own: how the reader itself writes an image; as good as markers.

    Raises:
        ValueError: the chat has another number of places than the row has images, or a place for a video.
    """
    images, placed = len(values_of(example)), in_parts(chat, example, own)
    kinds = [part.get("type") for message in placed for part in message["content"]]
    if "video" in kinds:
        raise ValueError("the prompt has a place for a video (a part or a marker <video>); videos are not read")
    places = kinds.count("image")
    if places == 0 and images:
        first = next((m for m in placed if m["role"] == "user"), placed[0])
        first["content"] = [{"type": "image"}] * images + first["content"]
    elif places != images:
        raise ValueError(f"the prompt has {places} image parts or markers such as <image>, the row has {images} images")
    return placed


def in_parts(chat: Chat, example: Example, own: tuple[str, ...] = ()) -> Chat:
    """Converts contents of a chat to lists of parts, `placed_images` of one whose images are in their places."""
    return [{**message, "content": _parts(message["content"], own)} for message in chat]


def _parts(content: str | list[Any], own: tuple[str, ...]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return split_at_markers(content, own)
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, dict) and part.get("type") == "image":
            parts.append({"type": "image"})  # it may carry the image itself, which templates have no use for
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            parts += split_at_markers(part["text"], own)
        elif isinstance(part, dict) and part.get("type") == "video":
            parts.append(part)
        else:
            raise ValueError(
                f"a part of the prompt is neither text nor an image: {quoted(part)}; write {{type: text, text: …}} or "
                "{type: image}"
            )
    return parts
