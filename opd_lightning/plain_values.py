"""Numbers, words and choices as values of settings: descriptions of types, and refusals of values."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, Union

import torch
from jsonargparse import ArgumentError, ArgumentParser

from .config_file import did_you_mean
from .jsonargparse_internals import type_to_str

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def refusal(value: Any, kinds: Sequence[Any]) -> str | None:
    """Explains why a value is of none of these types; None if it is, or if they are more than plain values."""
    kinds = [kind for kind in kinds if kind is not torch.Tensor]  # nobody writes one into a configuration
    if not kinds or not all(kind in WORDS or typing.get_origin(kind) is Literal for kind in kinds):
        return None
    if isinstance(value, Mapping):
        return f"it has no keys ({', '.join(map(str, value))}): {expected(kinds)}"
    try:
        _reader(Union[tuple(kinds)]).parse_object({"value": value})  # noqa: UP007
    except ArgumentError:
        word = {True: "on", False: "off"}.get(value) if isinstance(value, bool) else None
        if word in choices_of(kinds):
            return f'{expected(kinds)}, got {value!r}; put "{word}" in quotes, since YAML takes a bare {word} for that'
        return f"{expected(kinds)}, got {value!r}{did_you_mean(value, choices_of(kinds))}"
    return None


@cache
def _reader(kind: Any) -> ArgumentParser:
    """Builds a parser whose ``--value`` takes the values that jsonargparse will take later."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    return parser


def choices_of(kinds: Sequence[Any]) -> list[str]:
    """Lists the words that literals allow, each once."""
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    return list(dict.fromkeys(map(str, words)))


def expected(kinds: Sequence[Any]) -> str:
    """Describes types: ``expected a number or null``, ``expected one of constant, linear, cosine``."""
    distinct = [kind for kind in kinds if not (kind is int and float in kinds)]
    words = [WORDS.get(kind) or type_to_str(kind) for kind in distinct if typing.get_origin(kind) is not Literal]
    if choices := choices_of(kinds):
        words.insert(0, f"one of {', '.join(choices)}")
    return f"expected {' or '.join(words)}"
