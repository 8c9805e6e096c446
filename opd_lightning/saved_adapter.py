"""Adapters that were trained before, put on a base: all of one, on the layers that it was made for, or none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn

REFUSED = {
    "alora_invocation_tokens": "it is switched on by tokens of the prompt, of which layers know nothing here",
    "megatron_config": "it imports modules that its own configuration names",
}
_MISMATCH = re.compile(r"size mismatch for (\S+): .*?shape (\S*\[.*?\]).*?shape.*? (\S*\[.*?\])", re.DOTALL)


def load_saved(model: nn.Module, path: str, trained: bool) -> PeftModel:
    """Loads a saved adapter onto a model.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is of another kind than LoRA, or does not fit the model; the message names key and shapes.
    """
    # 1. kinds that are refused
    config = _config(path)
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"lora.adapter: {path} is of the kind {getattr(config.peft_type, 'value', '?')}, not LORA")
    for name, why in REFUSED.items():
        if getattr(config, name, None):
            raise ValueError(f"lora.adapter: {path} has {name}: {why}; such adapters are not supported")
    # 2. its weights on the model
    try:
        adapted = PeftModel.from_pretrained(model, path, is_trainable=trained)
    except RuntimeError as error:
        mismatch = _MISMATCH.search(str(error))
        if mismatch is None:
            raise
        raise ValueError(
            f"lora.adapter: {path} does not fit this base: {mismatch[1]} has the shape {mismatch[2]} there, "
            f"{mismatch[3]} here"
        ) from None
    # 3. all of them: peft leaves out what has no place, and draws what is missing
    saved, needed = load_peft_weights(path, device="cpu"), get_peft_model_state_dict(adapted)
    for names, fault in (
        (saved.keys() - needed.keys(), "which this base has no place for"),
        (needed.keys() - saved.keys(), "which this base needs and it lacks"),
    ):
        if names:
            shape = tuple((saved if min(names) in saved else needed)[min(names)].shape)
            raise ValueError(
                f"lora.adapter: {path} does not fit this base in {len(names)} weights, among them {min(names)} of "
                f"shape {shape}, {fault}"
            )
    return adapted


def _config(path: str) -> Any:
    try:
        return PeftConfig.from_pretrained(path)
    except (OSError, ValueError) as error:  # peft chains what the hub said
        where = "there is no folder" if path.count("/") > 1 and not Path(path).is_dir() else "there is no adapter in"
        raise FileNotFoundError(f"lora.adapter: {where} {path} ({str(error).splitlines()[0]})") from None
