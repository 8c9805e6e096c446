"""Verifiers of images: a picture and its example in, a number out."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...reward import Reward
from ...trajectory import Example


class Brightness(Reward):
    """1 if the mean of the image's pixels, in [0, 1], is at least as large, else 0.

    Args:
        at_least: default 0.5; digits are white on black.
    """

    def __init__(self, at_least: float = 0.5) -> None:
        self.at_least = at_least

    def __call__(self, completion: Any, example: Example) -> float:  # type: ignore[override]
        return float(np.asarray(completion, dtype=np.float32).mean() / 255 >= self.at_least)
