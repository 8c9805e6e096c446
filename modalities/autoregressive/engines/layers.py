"""Decoder layers for one token per row, which `DecodeLoop` runs on a CPU instead of the model's own forward pass.

Shape legend: n rows, H hidden size, G key heads, R query heads for each, S size of a head, L columns of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from .cache import RowCache, SharedPrompts, score_bias

KINDS = {"LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "Qwen3VLTextDecoderLayer"}
"""Layers of transformers whose computation is that of `_Layer`."""

Linear = Callable[[Tensor], Tensor]

_onednn: Any = torch.ops.mkldnn


class PackedDecoder:
    """Decoder of a transformers model, for many passes of one token per row.

    Weights that read the same input are one matrix, adapters are merged into it, and on a CPU it has oneDNN's layout.
    That is a copy of the layers' weights, made for a rollout and gone after it.

    Args:
        model: one for which `refusal` is None.
        rows: the most rows of a pass.
    """

    @staticmethod
    def refusal(model: Any) -> str | None:
        """Explains why only the model's own forward pass can be used; None: this class can."""
        decoder = _decoder(model)
        weight = next(model.parameters())
        if weight.device.type != "cpu":
            return "not on a CPU"  # not measured anywhere else
        if weight.dtype not in (torch.float32, torch.bfloat16):
            return f"weights in {weight.dtype}"
        layers = getattr(decoder, "layers", [])
        if not layers or any(type(layer).__name__ not in KINDS for layer in layers):
            return "layers of another kind"
        passed_by = [model.base_model, decoder, *(module for layer in layers for module in layer.modules())]
        if any(map(_is_watched, passed_by)):
            return "hooks on its modules"
        linears = [linear for layer in layers for linear in _linears(layer)]
        if not all(map(_can_be_merged, linears)):
            return "linear layers of another kind"
        half = weight.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
        if half and any(isinstance(linear, LoraLinear) for linear in linears):
            return "adapters in half precision"  # rounding the sum would swallow what a young adapter adds
        return None

    def __init__(self, model: Any, rows: int) -> None:
        decoder = _decoder(model)
        self._embed, self._rotary, self._norm = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        self._layers = [_Layer(layer, rows, dtype) for layer in decoder.layers]

    def __call__(self, tokens: Tensor, position: Tensor, cache: RowCache) -> Tensor:
        """Computes hidden states ``[n, H]`` of the next column.

        Args:
            tokens: ``[n]``.
            position: ``[n, 1]``, or ``[3 or 4, n, 1]`` for rotary embeddings of several axes.
            cache: keys and values of the n rows; those of this column are added.
        """
        # weights were cast when they were packed
        with torch.autocast("cpu", enabled=False):
            hidden = self._embed(tokens)
            # transformers puts a text position before the three axes of the rotary embedding
            axes = position[1:] if position.dim() == 3 and len(position) == 4 else position
            cos, sin = self._rotary(hidden[:, None], axes)
            # `_Layer` swaps the halves; the sign that the rotation gives the first one is here
            signed = torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], -1)
            mask = cache.attention_mask()
            bias = None if mask is None else score_bias(mask)
            for i, layer in enumerate(self._layers):
                hidden = layer(hidden, cos, signed, bias, cache, i)
            normed: Tensor = self._norm(hidden)
            return normed


class _Layer:
    def __init__(self, layer: Any, rows: int, dtype: torch.dtype | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.size, self.scaling = attention.head_dim, attention.scaling
        read, written = attention.q_proj.weight.shape[0], attention.k_proj.weight.shape[0]
        self.queries, self.keys = read // self.size, written // self.size
        self.qkv = joined([attention.q_proj, attention.k_proj, attention.v_proj], rows, dtype)
        self.out = joined([attention.o_proj], rows, dtype)
        self.gate_up = joined([mlp.gate_proj, mlp.up_proj], rows, dtype)
        self.down = joined([mlp.down_proj], rows, dtype)
        self.act, self.before, self.after = mlp.act_fn, layer.input_layernorm, layer.post_attention_layernorm
        self.head_norm: tuple[Tensor, float] | None = None
        if hasattr(attention, "q_norm"):
            # queries and keys are normed in one go
            scales = [attention.q_norm.weight.expand(self.queries, -1), attention.k_norm.weight.expand(self.keys, -1)]
            self.head_norm = torch.cat(scales), attention.q_norm.variance_epsilon

    def __call__(
        self, hidden: Tensor, cos: Tensor, signed: Tensor, bias: Tensor | None, cache: RowCache, place: int
    ) -> Tensor:
        """Computes hidden states ``[n, H]`` of the next layer.

        Args:
            hidden: ``[n, H]``.
            cos, signed: rotary tables ``[n, 1, S]``, the first half of the sine negative.
            bias: ``[n, 1, 1, L]`` of the scores.
            cache: keys and values.
            place: of this layer in the cache.
        """
        n = len(hidden)
        heads = self.qkv(_rms(hidden, self.before.weight, self.before.variance_epsilon)).view(n, -1, self.size)
        both, values = heads.split([self.queries + self.keys, self.keys], 1)
        if self.head_norm is not None:
            both = _rms(both, *self.head_norm)
        both = torch.addcmul(both * cos, both.roll(self.size // 2, -1), signed)
        queries = (both[:, : self.queries] * self.scaling).view(n, self.keys, -1, self.size)
        keys_values = cache.update(both[:, self.queries :, None], values[:, :, None], place)
        hidden = hidden + self.out(attend(queries, *keys_values, bias, cache.prompts, place).reshape(n, -1))
        gate, up = self.gate_up(_rms(hidden, self.after.weight, self.after.variance_epsilon)).chunk(2, -1)
        return hidden + self.down(self.act(gate) * up)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, prompts: SharedPrompts | None, place: int
) -> Tensor:
    """Computes attention ``[n, G, R, S]`` of scaled queries ``[n, G, R, S]`` over keys and values ``[n, G, L, S]``.

    Shared prompts ``[U, G, P, S]`` are columns before these L: the queries of all rows of a prompt meet its keys in one
    product.
    """
    if prompts is None:
        flat = queries.to(keys.dtype).flatten(1, 2)[:, :, None]
        bias = None if bias is None else bias.to(keys.dtype)
        values = values.to(keys.dtype)
        return F.scaled_dot_product_attention(flat, keys, values, attn_mask=bias, scale=1.0, enable_gqa=True)
    before = prompts.scores(queries, place)  # and no bias: what comes after a prompt has no padding
    scores = queries.to(keys.dtype) @ keys.transpose(2, 3)
    shares = torch.cat([before, scores], -1).softmax(-1, dtype=torch.float32).to(values.dtype)
    width = before.shape[-1]
    return prompts.read(shares[..., :width], place) + shares[..., width:] @ values


def _rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    # on a CPU half the time of F.rms_norm for a few rows
    y = x.float()
    return weight * (y * (y * y).mean(-1, keepdim=True).add_(epsilon).rsqrt_()).to(x.dtype)


def _decoder(model: Any) -> Any:
    body = model.base_model
    return getattr(body, "language_model", body)


def _linears(layer: Any) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    attended = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*attended, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _is_watched(module: nn.Module) -> bool:
    # neither hooks nor a replaced forward would be called here
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _can_be_merged(linear: Any) -> bool:
    if type(linear) is nn.Linear:
        return True
    plain = type(linear) is LoraLinear and type(linear.get_base_layer()) is nn.Linear
    return plain and not linear.lora_variant and not any(linear.lora_bias.values())


def joined(linears: Sequence[Any], rows: int, dtype: torch.dtype | None = None) -> Linear:
    """Joins linear layers with the same input to one, in this dtype (default: their own)."""
    weights, biases = zip(*map(_merged, linears), strict=True)
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return packed_linear(weight.to(dtype or weight.dtype), bias if bias is None else bias.to(dtype or bias.dtype), rows)


def _merged(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Merges the active adapters into weight ``[out, in]``; returns it and the bias ``[out]``."""
    adapted = isinstance(linear, LoraLinear)
    base = linear.get_base_layer() if adapted else linear
    weight = base.weight.detach()
    if adapted and not linear.disable_adapters and not linear.merged:
        for name in linear.active_adapters:
            if name in linear.lora_A:
                weight = weight + linear.get_delta_weight(name).detach()
    return weight, None if base.bias is None else base.bias.detach()


def packed_linear(weight: Tensor, bias: Tensor | None, rows: int) -> Linear:
    """Prepares a linear map ``[n, in]`` → ``[n, out]`` for many passes of so many rows, on a CPU in oneDNN's layout."""
    onednn = torch.backends.mkldnn.is_available() and weight.device.type == "cpu"
    if onednn and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _has_bf16())):
        layout = _onednn._reorder_linear_weight(weight.detach(), rows)
        bias = None if bias is None else bias.detach()
        return lambda x: _onednn._linear_pointwise(x.to(weight.dtype), layout, bias, "none", [], "")
    return lambda x: F.linear(x.to(weight.dtype), weight, bias)


def _has_bf16() -> bool:
    return bool(_onednn._is_mkldnn_bf16_supported())
