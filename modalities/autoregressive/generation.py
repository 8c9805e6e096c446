"""Generation settings: what `generate` has to be told of a student, beside those that its base came with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import GenerationConfig

from .audit import Audited
from .models import bare, listed


class Generating:
    """Mixin of a setting whose students are exported for transformers' `generate`."""

    def generation_settings(self) -> dict[str, int | list[int]]:
        """Returns what `generate` has to be told of the student: its suppressed ids and its stop ids.

        Suppressed are padding of the head and placeholders.
        """
        setting = cast(Audited, self)
        model = bare(setting.policies["student"].model)
        rows = model.get_output_embeddings().weight.shape[0]
        impossible = sorted({*range(setting.vocabulary, rows), *setting.suppressed()})
        own = model.generation_config.eos_token_id
        stops = own if {*setting.eos} <= {*listed(own)} else setting.eos
        return {"eos_token_id": stops} | ({"suppress_tokens": impossible} if impossible else {})

    def save_student(self, model: nn.Module, folder: Path) -> None:
        """Writes the student with these settings, which transformers may refuse to save beside others of its base."""
        settings = bare(model).generation_config
        vars(settings).update(self.generation_settings())
        make_savable(settings)
        super().save_student(model, folder)  # type: ignore[misc]


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
