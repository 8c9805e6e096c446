"""Methods: parts that one paper alone uses, a file a family; what two papers share belongs to the core."""

from . import advantage, callback, signal, weight

__all__ = ["advantage", "callback", "signal", "weight"]
