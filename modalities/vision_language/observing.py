"""Observations that hold images: their places in a conversation, their tokens, and what each policy sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from PIL import Image

from ...images import as_stored, open_image
from ...policy import Policy, View
from ...trajectory import Example
from ..autoregressive.observing import Given, Heard, as_messages, between
from ..autoregressive.rendering import Renderer
from .images import CARRIERS, image_parts, images_of
from .placing import in_parts, mark_of, marks_of

OBSERVED = "images observed behind the prompt"
"""Column of an example with the images of its observations, as a policy sees them."""


class Seeing(Protocol):
    """Interface of a setting whose policies observe images."""

    @property
    def eos(self) -> list[int]: ...
    def renderer(self, policy: Policy) -> Renderer: ...


def image_ids(processor: Any) -> list[int]:
    """Lists the ids whose embeddings are those of an image."""
    return list(getattr(processor, "image_token_ids", None) or [processor.image_token_id])


def observed_images(observation: str | list[Any]) -> list[dict[str, Any]]:
    """Lists the image parts of an observation, in order.

    Raises:
        ValueError: as in `image_parts`; one that holds no image.
    """
    parts = image_parts(as_messages(observation, ""))
    if any(all(part.get(key) is None for key in CARRIERS) for part in parts):
        raise ValueError("an image part of an observation holds no image: write {type: image, image: …}")
    return parts


def heard_images(
    module: Seeing,
    reader: Policy,
    example: Example,
    observation: str | list[Any],
    parts: Sequence[dict[str, Any]],
    role: str,
) -> Heard:
    """Reads an observation with images; what is written for each is what the processor makes of it.

    Args:
        module: the setting.
        reader: whose processor reads it.
        example: with the prompt that is rendered.
        observation: of an environment.
        parts: its images.
        role: of what is no message.

    Raises:
        ValueError: an image can't be read, or the chat template writes no place for one.
    """
    renderer, row = _placed(module, reader, example)
    return _expanded(reader.processor, between(renderer, row, observation, role, module.eos), parts)[0]


def given_images(module: Seeing, reader: Policy, row: Example, parts: Sequence[dict[str, Any]]) -> Given:
    """Reads a completion of several messages, some of which have images; arguments as in `heard_images`."""
    renderer, row = _placed(module, reader, row)
    ids, written = renderer.completion(row, module.eos)
    heard, sources = _expanded(reader.processor, ids, parts)
    return Given(heard.ids, [written[source] for source in sources], heard.values)


def _placed(module: Seeing, reader: Policy, example: Example) -> tuple[Renderer, Example]:
    """Puts the images of a prompt in their places; what follows has its own in theirs."""
    renderer = module.renderer(reader)
    chat = renderer.prepare(renderer.messages(example["prompt"]), example)
    return replace(renderer, prepare=partial(in_parts, own=marks_of(reader.processor))), {**example, "prompt": chat}


def _expanded(processor: Any, ids: list[int], parts: Sequence[dict[str, Any]]) -> tuple[Heard, list[int]]:
    """Puts the tokens of images in the places that a template has for them, and tells where each token comes from."""
    mark = mark_of(processor)
    place = processor.tokenizer.convert_tokens_to_ids(mark)
    if ids.count(place) != len(parts):
        raise ValueError(
            f"the chat template of {processor.tokenizer.name_or_path} writes {ids.count(place)} places for "
            f"{len(parts)} observed images"
        )
    heard, sources, remaining = Heard(), [], iter(parts)
    for index, token in enumerate(ids):
        own = [token]
        if token == place:
            part = next(remaining)
            carried = next(part[key] for key in CARRIERS if part.get(key) is not None)
            image = open_image(carried)
            facts = {k: value for k, value in part.items() if k not in ("type", *CARRIERS) and value is not None}
            heard.values.append({"at": len(heard.ids), "image": _file(carried, image), **facts})
            inputs = processor(text=[mark], images=[[image]], add_special_tokens=False, return_tensors="pt")
            own = inputs["input_ids"][0].tolist()
        heard.ids.extend(own)
        sources += [index] * len(own)
    return heard, sources


def _file(carried: Any, image: Image.Image) -> bytes:
    """Returns the file of an image, which a checkpoint can hold; of one that is none yet, a PNG."""
    data = carried.get("bytes") if isinstance(carried, dict) else carried
    return data if isinstance(data, bytes) else bytes(as_stored(image)["bytes"])


def seen_by(view: View | None, values: Sequence[dict[str, Any]]) -> list[Image.Image]:
    """Opens what was observed, as a policy with this view sees it.

    A view that ``marks`` draws on each image that has what it reads (its columns), and keeps its size, and so the
    number of its tokens; all others leave observations as they are.
    """
    images = []
    for value in values:
        row = {**value, "prompt": "", "image": open_image(value["image"])}
        marked = view(row) if view is not None and getattr(view, "marks", False) else None
        images.append(images_of(marked or row)[0])
    return images
