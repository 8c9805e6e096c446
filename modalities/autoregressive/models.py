"""Reading transformers models, with or without adapters around them."""

from __future__ import annotations

import inspect
from typing import Any

from peft import PeftModel
from torch import nn

from ...teacher import Policy


def bare(model: nn.Module) -> Any:
    """The transformers model itself, with adapters inside it where there are any."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer itself, where it is part of a processor of several modalities."""
    return getattr(processor, "tokenizer", processor)


def output_embeddings(policy: Policy) -> Any:
    return bare(policy.model).get_output_embeddings()


def known_ids(policy: Policy) -> int:
    """Ids below it have a row of their own, both in the embeddings and in the head."""
    read = bare(policy.model).get_input_embeddings()
    return int(min(read.weight.shape[0], output_embeddings(policy).weight.shape[0]))


def cache_name(model: Any) -> str | None:
    """What the body's forward pass calls the cache: ``cache`` since transformers 5.24, ``past_key_values`` before."""
    names = inspect.signature(model.base_model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def eos_ids(policy: Policy) -> list[int]:
    """Stop ids of the tokenizer and of the checkpoint's generation settings (chat models have several)."""
    configured = getattr(bare(policy.model).generation_config, "eos_token_id", None)
    return sorted({*listed(configured), *listed(tokenizer_of(policy.processor).eos_token_id)})


def listed(ids: int | list[int] | None) -> list[int]:
    """One id, several or none, as configurations hold them."""
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def context_length(policy: Policy) -> int:
    return int(getattr(bare(policy.model).config.get_text_config(), "max_position_embeddings", 2**31))
