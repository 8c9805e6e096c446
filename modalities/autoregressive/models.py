"""Reading transformers models, with or without adapters around them."""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ...distribution import Head
from ...policy import Policy
from ...sharding import is_sharded

READ = {"input_ids", "attention_mask", "position_ids"}
"""What the body of a text model reads of every row."""


def bare(model: nn.Module) -> Any:
    """Returns the transformers model itself, with adapters inside it where there are any."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def tokenizer_of(processor: Any) -> Any:
    """Returns the tokenizer itself, where it is part of a processor of several modalities."""
    return getattr(processor, "tokenizer", processor)


def output_embeddings(policy: Policy) -> Any:
    """Returns the projection from hidden states to logits."""
    return bare(policy.model).get_output_embeddings()


def head_at(device: torch.device, head: Head, name: str, copies: dict[str, nn.Module]) -> Head:
    """Returns the head of a teacher on a device: where it lives on another one, with a copy that is made once.

    Args:
        device: the objective's.
        head: the teacher's own.
        name: of the teacher.
        copies: those that were made, by teacher.
    """
    if next(head.module.parameters()).device == device:
        return head
    if name not in copies:
        copies[name] = copy.deepcopy(head.module).to(device)
    return replace(head, module=copies[name])


def known_ids(policy: Policy) -> int:
    """Counts the ids that have a row both in the embeddings and in the head."""
    read = bare(policy.model).get_input_embeddings()
    return int(min(read.weight.shape[0], output_embeddings(policy).weight.shape[0]))


def check_tokenizer(student: Policy, teacher: Policy, vocabulary: int, kind: str) -> None:
    """Compares tokenizers by content: the same id must mean the same bytes, however the vocabularies are padded.

    Args:
        student: whose tokens are written.
        teacher: who reads them.
        vocabulary: ids below it are compared.
        kind: of the teacher's weights, for the message.

    Raises:
        ValueError: an id means something else.
    """
    ids, other = (tokenizer_of(policy.processor).get_vocab() for policy in (student, teacher))
    text = {i: token for token, i in other.items()}
    for token, i in sorted(ids.items(), key=lambda item: item[1]) if ids != other else ():
        if i < vocabulary and text.get(i) != token:
            raise ValueError(
                f"model.teachers.{teacher.name}: its tokenizer ({teacher.path}) reads id {i} as {text.get(i)!r}, the "
                f"student's ({student.path}) as {token!r}. Distilling per token needs equal tokenizers: make its "
                f"weights OtherTokenizer instead of {kind}, which reads the text (docs/elsewhere.md), or choose a "
                "teacher of the same family"
            )


def cache_name(model: Any) -> str | None:
    """Names the body's argument for the cache: ``cache`` since transformers 5.24, ``past_key_values`` before."""
    names = inspect.signature(model.base_model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def problem_with_cache(model: Any) -> str | None:
    """Explains why rows can't be continued from nothing but the keys and values of all their tokens; None: they can."""
    if model.config.is_encoder_decoder:
        return "an encoder and a decoder"
    if is_sharded(model):
        return "sharded weights"  # ranks would have to make equally many passes
    if not inspect.signature(model.base_model.forward).parameters.keys() >= READ or cache_name(model) is None:
        return "a forward pass without position ids or cache"
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if kinds != {DynamicLayer} or getattr(model, "_is_stateful", False):
        return "layers that keep other things than the keys and values of every token"
    return None


def eos_ids(policy: Policy) -> list[int]:
    """Collects stop ids of the tokenizer and of the checkpoint's generation settings (chat models have several)."""
    configured = getattr(bare(policy.model).generation_config, "eos_token_id", None)
    return sorted({*listed(configured), *listed(tokenizer_of(policy.processor).eos_token_id)})


def listed(ids: int | list[int] | None) -> list[int]:
    """Converts one id, several or none, as configurations hold them, to a list."""
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def context_length(policy: Policy) -> int:
    """Returns the most tokens that a row may have.

    Under fsdp2 not beyond the switch of longrope: ranks must make equally many passes, whatever their rows' lengths.
    """
    model = bare(policy.model)
    length = int(getattr(model.config.get_text_config(), "max_position_embeddings", 2**31))
    switch = rope_switch(model) if is_sharded(model) else None
    return length if switch is None else min(length, switch)


def depth(policy: Policy) -> int:
    """Counts the layers of a policy's text model."""
    return int(getattr(bare(policy.model).config.get_text_config(), "num_hidden_layers", 0))


def rope_switch(model: Any) -> int | None:
    """Returns the length beyond which rows are rotated in another way (longrope: Phi-3.5, Phi-4-mini, …); None: never.

    transformers compares it with the longest row of a pass.
    """
    switches = [
        int(rope["original_max_position_embeddings"]) for rope in _ropes(model) if rope["rope_type"] == "longrope"
    ]
    return min(switches, default=None)


def rope_kinds(model: Any) -> list[str]:
    """Lists the kinds of its rotary embeddings that depend on the longest row of a pass."""
    kinds = {str(rope["rope_type"]) for rope in _ropes(model)}
    return sorted(kind for kind in kinds if kind == "longrope" or "dynamic" in kind)


def _ropes(model: Any) -> list[dict[str, Any]]:
    """Lists the rotary embeddings of the text: one, or one for each kind of layer."""
    given = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    several = [part for part in given.values() if isinstance(part, dict)]
    return [rope for rope in several or [given] if "rope_type" in rope]


def unknown_characters(tokenizer: Any, text: str) -> str:
    """Finds the characters of a text that a tokenizer fails on; all of them where it reads each alone."""

    def fails(character: str) -> bool:
        try:
            tokenizer(character)
        except Exception:  # tokenizers raise nothing narrower
            return True
        return False

    characters = sorted({*text})
    return "".join(filter(fails, characters)) or "".join(characters)
