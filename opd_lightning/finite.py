"""Settings that are numbers: NaN and infinity are refused wherever one is set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def check_finite(name: str, value: Any) -> None:
    """Refuses NaN and infinity, also inside mappings and lists.

    Raises:
        ValueError: it is a float that is NaN or infinite, or holds one; the message names which.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {value}")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            check_finite(f"{name}.{key}", inner)
    if isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            check_finite(f"{name}[{index}]", inner)


class Finite:
    """Base of parts whose attributes are settings, checked when they are built and when a callback sets one.

    Comparisons with NaN are all false, so that checks of ranges let it pass. Names that begin with an underscore are
    not checked. A dataclass takes ``__setattr__`` alone: with a base class its YAML would need class_path.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            check_finite(f"{type(self).__name__}.{name}", value)
        if isinstance(self, Finite):  # a torch module registers its parameters here
            super().__setattr__(name, value)
        else:
            object.__setattr__(self, name, value)
