"""The packed layers against the model's own forward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen2Config, Qwen3Config

from opd_lightning.adapters import only_adapters
from opd_lightning.modalities.autoregressive import DecodeLoop
from opd_lightning.modalities.autoregressive.engines.cache import RowCache
from opd_lightning.modalities.autoregressive.engines.decode_loop import own_forward
from opd_lightning.modalities.autoregressive.engines.layers import PackedDecoder, packed_linear

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3": (Qwen3Config, {}),
    "qwen3_three_queries_per_key": (Qwen3Config, {"num_attention_heads": 6, "num_key_value_heads": 2}),
    "qwen2": (Qwen2Config, {}),
    "llama": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama_with_biases_and_yarn": (
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "rope_parameters": YARN},
    ),
}


def make(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    kind, own = MODELS[name]
    common = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    model = AutoModelForCausalLM.from_config(kind(**{**common, **own, **settings})).eval()
    for parameter in model.parameters():  # norms and biases that do something
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def written(model: Any, packed: bool, share: bool = False, lengths: tuple[int, ...] = (7, 3, 5)) -> list[torch.Tensor]:
    """Hidden states of five columns of seven rows on three prompts, two rows leaving after the second."""
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    seen = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    ids = torch.randint(40, seen.shape, generator=generator)
    read = DynamicCache(config=model.config)
    position = (seen.long().cumsum(1) - 1).clamp(min=0)
    model.base_model(input_ids=ids, attention_mask=seen.long(), position_ids=position, past_key_values=read)
    row = torch.tensor([0, 2, 2, 1, 0, 0, 2])
    cache = RowCache(read, row, seen, 5, share=share)
    body = PackedDecoder(model, len(row)) if packed else partial(own_forward, model)
    position, found = torch.tensor(lengths)[row, None], []
    for step in range(5):
        tokens = torch.randint(40, (len(row),), generator=generator)
        if step == 2:
            order = torch.tensor([0, 6, 2, 5, 4])  # the last row of prompt 1 is gone
            cache.keep(order)
            position = position[order]
        tokens = tokens[: cache.rows]
        found.append(body(tokens, position + step, cache))
        cache.advance()
    return found


def agree(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < tolerance * other.abs().max()


@pytest.mark.parametrize("lengths", [(7, 3, 5), (6, 6, 6)], ids=["padded", "equal"])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_the_models(name, lengths):
    model = make(name)
    assert PackedDecoder.refusal(model) is None
    expected = written(model, packed=False, lengths=lengths)
    agree(written(model, packed=True, lengths=lengths), expected)
    agree(written(model, packed=True, share=True, lengths=lengths), expected)


def test_adapters_are_merged_while_they_act():
    model = make("qwen3")
    plain = written(model, packed=True)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    assert PackedDecoder.refusal(model) is None
    adapted.eval()
    agree(written(model, packed=True), written(model, packed=False))
    assert (written(model, packed=True)[0] - plain[0]).abs().max() > 1e-2
    with only_adapters(adapted):
        agree(written(model, packed=True), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "half precision" in str(PackedDecoder.refusal(model))


def test_half_precision_stays_near():
    """The layers compute in the trainer's precision; the rest is wider than the model's own, never narrower."""
    model = make("qwen3")
    exact = written(model, packed=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own, packed = written(model, packed=False), written(model, packed=True, share=True)
    agree(packed, exact, 0.1)
    for mine, theirs, true in zip(packed, own, exact, strict=True):
        assert (mine.float() - true).pow(2).mean() < 2 * (theirs.float() - true).pow(2).mean() + 1e-6
    half = make("qwen3").to(torch.bfloat16)
    for share in (False, True):
        found = written(half, packed=True, share=share)
        assert found[0].dtype == torch.bfloat16
        agree([part.float() for part in found], exact, 0.2)


def test_what_it_cannot_read_is_left_to_the_model():
    refusal = PackedDecoder.refusal
    assert "torch.float64" in str(refusal(make("llama").double()))
    hooked = make("llama")
    hooked.base_model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert "hooks" in str(refusal(hooked))
    replaced = make("llama")
    replaced.base_model.layers[0].self_attn.o_proj = torch.nn.Sequential(torch.nn.Linear(64, 32))
    assert "linear layers" in str(refusal(replaced))
    other = make("llama")
    get_peft_model(other, LoraConfig(r=2, use_dora=True, target_modules="all-linear"))
    assert "linear layers" in str(refusal(other))
    strange = make("llama")
    strange.base_model.layers[0] = torch.nn.Identity()
    assert "another kind" in str(refusal(strange))
    assert DecodeLoop(packed=False).packed is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_packed_matrix_is_the_matrix(dtype):
    weight, bias = torch.randn(12, 20, dtype=dtype), torch.randn(12, dtype=dtype)
    for given in (bias, None):
        linear = packed_linear(weight, given, 9)
        for rows in (9, 4, 1):
            x = torch.randn(rows, 20, dtype=dtype)
            expected = x.double() @ weight.double().T + (0 if given is None else given.double())
            assert torch.allclose(linear(x).double(), expected, atol=5e-2 if dtype == torch.bfloat16 else 1e-5)
