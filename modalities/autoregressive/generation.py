"""Generation settings that a base came with, and transformers refuses to save once a part of them is another."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import GenerationConfig


def make_savable(settings: GenerationConfig) -> None:
    """Repairs settings in place, and says how.

    Where it is left open whether tokens are sampled, settings of sampling (``temperature``, …) say that they are; what
    is then still refused means nothing to `generate`, and goes.
    """
    changes = []
    if "`do_sample`" in _refusal(settings) and settings.do_sample is None:
        settings.do_sample = True
        changes.append("do_sample is True now")
    for name, value in settings.to_diff_dict().items():
        if f"`{name}`" in (refused := _refusal(settings)):
            setattr(settings, name, getattr(GenerationConfig(), name, None))
            if _refusal(settings) == refused:
                setattr(settings, name, value)  # not its fault
            else:
                changes.append(f"{name}={value} is left out")
    if changes:
        rank_zero_info(f"The base's generation settings can't be saved as they are: {'; '.join(changes)}")


def _refusal(settings: Any) -> str:
    """Returns transformers' refusal to save the settings; empty if there is none."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return str(error)
    return ""
