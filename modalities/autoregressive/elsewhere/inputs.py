"""Inputs besides token ids, such as pixels: how they travel with a question, and what a server lets its model read.

Shape legend: P prompt tokens of one row.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ....printable import quoted
from .question import Question

GRID = "grid_thw"
"""End of the names of inputs that tell how pixels are placed: frames, rows and columns of each image."""


def packed(inputs: Mapping[str, Tensor]) -> str:
    """Writes inputs as text, for JSON."""
    return base64.b64encode(save({name: tensor.cpu().contiguous() for name, tensor in inputs.items()})).decode()


def unpacked(text: Any) -> dict[str, Tensor]:
    """Reads what `packed` wrote.

    Raises:
        ValueError: it is something else, or was cut.
    """
    try:
        return load(base64.b64decode(text, validate=True)) if text else {}
    except (ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"inputs is no file of safetensors in base64: {quoted(str(error), 200)}") from error


def forms(inputs: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Describes inputs by their names: type and number of dimensions."""
    return {name: [str(tensor.dtype).removeprefix("torch."), tensor.dim()] for name, tensor in inputs.items()}


def check_forms(inputs: Mapping[str, Tensor], known: Mapping[str, Any], who: str) -> None:
    """Refuses inputs that a model does not read.

    Args:
        inputs: of one row.
        known: `forms` of those that it reads.
        who: reads them, for the message.

    Raises:
        ValueError: it reads none at all, or others.
    """
    if not known:
        raise ValueError(f"{who} has no eyes: it reads text alone, and would never see the prompt's images")
    if (given := forms(inputs)) != dict(known):
        raise ValueError(f"{who} is shown {_listed(given)}, and reads {_listed(known)}: is its processor another one?")


def check_inputs(question: Question, known: Mapping[str, Any], types: Iterable[str]) -> None:
    """Refuses inputs that would let a model fail, or take memory that no image is worth.

    Args:
        question: with them.
        known: `forms` of those that the model reads.
        types: names of those that there is one of for each token of the prompt, ``[1, P]``.

    Raises:
        ValueError: with the name.
    """
    check_forms(question.inputs, known, "this teacher")
    for name, tensor in question.inputs.items():
        if not tensor.numel():
            raise ValueError(f"{name} is empty, of the shape {list(tensor.shape)}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds something that is no number")
        if name in types and list(tensor.shape) != [1, len(question.prompt)]:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, and the prompt {len(question.prompt)} tokens")
    for name in (name for name in question.inputs if name.endswith(GRID)):
        # positions are computed of it before anything compares it with the pixels; in Python's numbers, which are of
        # unlimited size, where those of torch would come round to small ones
        grid, patches = question.inputs[name], len(question.inputs[name.replace("image_" + GRID, "pixel_values")])
        if bool((grid <= 0).any()) or sum(map(math.prod, grid.tolist())) != patches:
            raise ValueError(f"{name} is {quoted(grid.tolist(), 200)}, and there are {patches} patches")


def _listed(named: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({' of '.join(map(str, form))} dimensions)" for name, form in named.items()) or "nothing"
