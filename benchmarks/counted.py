"""What a model's body keeps and needs in memory, counted by running it without contents.

transformers' and peft's own code runs forward and backward with tensors that have a size and no storage, so nothing is
guessed and a change in these libraries is seen.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCABULARY, CONTEXT = 151_936, 40_960
RANK = 32  # the default of Lora.r
# hidden, intermediate, layers, heads, key heads, size of a head, tied head: the config.json of Qwen/Qwen3-* on the hub,
# checked against pytorch/torchtune, torchtune/models/qwen3/_model_builders.py; the last two are the benchmarks' own
SHAPES = {
    "0.6B": (1024, 3072, 28, 16, 8, 128, True),
    "1.7B": (2048, 6144, 28, 16, 8, 128, True),
    "4B": (2560, 9728, 36, 32, 8, 128, True),
    "8B": (4096, 12288, 36, 32, 8, 128, False),
    "14B": (5120, 17408, 40, 40, 8, 128, False),
    "32B": (5120, 25600, 64, 64, 8, 128, False),
    "student": (256, 768, 4, 4, 2, 64, True),
    "teacher": (384, 1152, 6, 6, 3, 64, True),
}


class Live(TorchDispatchMode):
    """Bytes of the tensors made within it that are alive, and the most there were."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for storage in [x.untyped_storage() for x in tree_leaves(made) if isinstance(x, torch.Tensor)]:
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def built(name: str, dtype: torch.dtype, lora: bool, layers: int | None = None) -> Any:
    """The model without contents, with fewer layers if asked."""
    hidden, inner, own, heads, keys, size, tied = SHAPES[name]
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers or own,
        num_attention_heads=heads, num_key_value_heads=keys, head_dim=size, tie_word_embeddings=tied,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3ForCausalLM._from_config(config, dtype=dtype)
        return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear")) if lora else model


@cache
def counts(name: str) -> tuple[int, int, int, int]:
    """Weights of the layers' matrices, the largest of them, all other weights, and those of adapters."""
    model = built(name, torch.bfloat16, True)
    linear = [m.base_layer.weight.numel() for m in model.modules() if hasattr(m, "base_layer")]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return sum(linear), max(linear), sum(p.numel() for p in model.parameters()) - sum(linear) - trained, trained


@cache
def passed(
    name: str,
    half: bool,
    lora: bool,
    mixed: bool,
    checkpointing: bool,
    train: bool,
    gradients: bool,
    layers: int,
    n: int,
) -> tuple[int, int, int]:
    """Bytes beside the weights for a pass of n tokens through the body: kept after the forward pass, most in it, and
    most in the backward pass, gradients included unless there are some from micro-batches before (``gradients``)."""
    model = built(name, torch.bfloat16 if half else torch.float32, lora, layers).train(train)
    with FakeTensorMode():
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for key, tensor in [(k, t) for k, t in held.items() if t is not None]:
                    held[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        held[key] = nn.Parameter(held[key], tensor.requires_grad)
        if checkpointing and train:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if lora:
                model.enable_input_require_grads()
        weights = [*model.parameters(), *model.buffers()]
        for weight in weights:
            if gradients and weight.requires_grad:
                weight.grad = torch.empty_like(weight)
        body = (model.get_base_model() if lora else model).base_model
        ids = torch.zeros(1, n, dtype=torch.long)
        with Live([*weights, *(w.grad for w in weights if w.grad is not None), ids]) as live:
            with torch.autocast("cpu", torch.bfloat16, mixed, cache_enabled=False), torch.set_grad_enabled(train):
                out = body(input_ids=ids, use_cache=False)[0]
            kept, forward, live.peak = live.now, live.peak, live.now
            if train:
                out.backward(torch.empty_like(out))
            return kept, forward, live.peak
