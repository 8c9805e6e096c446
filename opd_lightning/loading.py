"""Errors of loading, with the key of the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_OF_A_SPEC = re.compile(
    r"(path|dtype|quantization|lora(\.\w+)?|freeze|random_init|dropout|gradient_checkpointing)\b[:=]"
)
_KINDS = (FileNotFoundError, OSError, ModuleNotFoundError, ValueError)


@contextmanager
def loading(key: str) -> Iterator[None]:
    """Adds the key of the model that is loaded, ``model.student`` or a teacher's, to errors that are raised within.

    Raises:
        FileNotFoundError, OSError, ModuleNotFoundError, ValueError: whichever was raised, after its key.
    """
    try:
        yield
    except _KINDS as error:
        kind = next(kind for kind in _KINDS if isinstance(error, kind))
        raise kind(_named(key, str(error))) from error


def _named(key: str, text: str) -> str:
    text = text.removeprefix("student.")
    return f"{key}.{text}" if _OF_A_SPEC.match(text) else f"{key}: {text}"
