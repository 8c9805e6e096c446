"""Digit significance: weights of tokens by the digits of a coordinate that they write."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ...objective.steps import Steps
from ...objective.weight import Weight

_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")


class DigitSignificance(Weight):
    """Weight N − k of a token that writes the k-th digit (from 0) of a number of N digits: hundreds 3, tens 2, units 1.

    This is the "linear" base of GUI-SD (2605.00642); tokens without digits weigh ``other``.

    It reads the channel ``digits`` of the trajectories, which GUI grounding fills with `digit_places`. A token of
    several digits counts as its most significant one.

    Args:
        cap: the largest weight; 3 lets pixels of four digits weigh as points up to 1000 do. Default: no cap, as in
            GUI-SD's code.
        other: default 0.1, the value of GUI-SD's script (which trains with the uniform base, so it goes unused there).

    Raises:
        ValueError: cap < 1 or other < 0.
    """

    needs = frozenset({"digits"})
    advice = Weight.advice | {
        "digits": "only settings that read numbers out of tokens know them (GUIGroundingDistillation)"
    }
    scope = "data"

    def __init__(self, cap: int | None = None, other: float = 0.1) -> None:
        if cap is not None and cap < 1:
            raise ValueError(f"weight.cap must be >= 1, got {cap}")
        if other < 0:
            raise ValueError(f"weight.other must be >= 0, got {other}")
        self.cap, self.other = cap, other

    def __call__(self, steps: Steps) -> Tensor:
        places = steps.channel("digits")
        capped = places if self.cap is None else places.clamp(max=self.cap)
        return torch.where(places > 0, capped, self.other)


def digit_places(tokens: list[int], decode: Callable[[list[int]], str]) -> list[int]:
    """Computes N − k of the most significant digit that each token of a completion writes, 0 where it writes none.

    Numbers are found in the decoded text, and a token is the text gained by it, so that neither merged digits
    (``10`` + ``43``: 4 and 2), nor spaces that a token brings along, nor characters of several tokens get in the way. A
    decimal point doesn't end a number, and N counts the digits on both sides: ``0.482`` has 4, 3, 2, 1, so that 482
    weighs as it does on a scale to 1000, and a digit never weighs less than one after it.

    Args:
        tokens: one completion.
        decode: text of a list of tokens. One that leaves out special tokens keeps digits in their names from counting.
    """
    text = decode(tokens)
    places = [0] * len(text)
    for number in _NUMBER.finditer(text):
        left = sum(map(str.isdigit, number[0]))
        for i in range(*number.span()):
            if text[i] != ".":
                places[i], left = left, left - 1
    if not any(places):
        return [0] * len(tokens)
    significance, start = [], 0
    for i in range(1, len(tokens) + 1):
        # an unfinished character shows up as a replacement that the whole text has not
        end = max(start, _agreeing(decode(tokens[:i]), text))
        significance.append(max(places[start:end], default=0))
        start = end
    return significance


def _agreeing(prefix: str, text: str) -> int:
    """Counts the characters that two texts share from their start."""
    differing = (i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b)
    return next(differing, min(len(prefix), len(text)))
