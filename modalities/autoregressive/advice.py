"""Advice where people guess: learning rates by the size of a model that writes tokens."""

from __future__ import annotations

FULL = ((50e6, 1e-3), (1e9, 5e-5), (float("inf"), 1e-5))
"""Learning rates of AdamW where all weights are trained, by the number of parameters that a model stays below.

1e-3 is what the quickstart's 0.1 M learn with (measured here). From 1 B on 1e-5 is the default of the package;
published runs have between 2.5e-6 (8 B, GUI-SD, 2605.00642) and 5e-5 (9 B, tinker-cookbook 0.6.1). Between the two
nothing was measured.
"""
LORA = ((1e9, 5e-4), (float("inf"), 1e-4))
"""The same of adapters: 5e-4 is measured on 135 M (docs/recipes.md), 1e-4 is tinker-cookbook's for 9 B."""
FAR = 20.0
"""Factor beyond which a learning rate is worth a warning; published ones of one size differ by as much."""


def learning_rate(parameters: int, lora: bool) -> float:
    """Returns a learning rate to begin with.

    Args:
        parameters: of the model, without adapters.
        lora: whether adapters are trained rather than all weights.
    """
    return next(rate for size, rate in (LORA if lora else FULL) if parameters < size)
