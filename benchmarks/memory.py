"""The peak of one training step, phase by phase and term by term.

What a model's body keeps and needs is counted: transformers' and peft's own code runs forward and backward with tensors
that have a size and no storage. The rest is arithmetic on the shapes.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCABULARY, CONTEXT = 151_936, 40_960
RANK, CHUNK = 32, 192 * 2**20  # defaults of Lora.r and Objective.chunk_mib
# hidden, intermediate, layers, heads, key heads, size of a head, tied head: pytorch/torchtune,
# torchtune/models/qwen3/_model_builders.py; the size of a head as others quote the config.json of 0.6B, 4B, 14B and
# 32B. They sum to the published 0.6, 1.7, 4.0, 8.2, 14.8 and 32.8 B weights. The last two are the other benchmarks'
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
# Per weight: int8 with a float32 scale per row is 1 byte; nf4 has a byte per 64 weights and double quantization
BYTES = {32: 4.0, 16: 2.0, 8: 1.0, 4: 0.5 + 1 / 64 + 4 / (64 * 256)}
STATE = {32: 8.0, 8: 2 + 2 * 4 / 256}  # both moments of AdamW, per trained weight


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
                # tensors without contents would be given a mask of n × n that real ones of one length do without
                out = body(input_ids=ids, attention_mask={"full_attention": None}, use_cache=False)[0]
            kept, forward, live.peak = live.now, live.peak, live.now
            if train:
                out.backward(torch.empty_like(out))
            return kept, forward, live.peak


@dataclass(frozen=True)
class Run:
    """One configuration; ``teacher`` None is the student with its adapter switched off."""

    student: str
    lora: bool
    teacher: str | None
    bits: int = 16  # of a LoRA student's base; what is trained is float32
    teacher_bits: int = 16
    adam: int = 32
    rows: int = 8
    micro: int = 1
    checkpointing: bool = True
    mixed: bool = True  # trainer.precision: bf16-mixed, otherwise 32-true
    cpu: bool = False

    @property
    def name(self) -> str:
        how = f"LoRA{f' on {self.bits} bit' * (self.bits < 16)}" if self.lora else f"full, AdamW {self.adam} bit"
        teacher = "itself" if self.teacher is None else f"{self.teacher}, {self.teacher_bits} bit"
        return f"{self.student} {how} | {teacher}"


def body(run: Run, name: str, half: bool, lora: bool, train: bool, n: int) -> tuple[float, ...]:
    """`passed` for all layers; for the table along straight lines between a few passes."""
    settings, layers = (name, half, lora, run.mixed, run.checkpointing, train, run.rows > run.micro), SHAPES[name][2]
    if run.cpu:
        return passed(*settings, layers, n)
    grid = [1024, CONTEXT]
    few, more = (np.array([passed(*settings, some, tokens) for tokens in grid], float).T for some in (2, 3))
    return tuple(float(np.interp(n, grid, a + (b - a) * (layers - 2))) for a, b in zip(few, more, strict=True))


def phases(run: Run, prompt: int, completion: int) -> dict[str, dict[str, float]]:
    """What lives in each phase of a step, term by term, in bytes; the peak is the largest sum."""
    hidden, inner, layers, heads, keys, size, _ = SHAPES[run.student]
    linear, largest, others, adapters = counts(run.student)
    trained = adapters if run.lora else linear + others
    head, tokens, states = VOCABULARY * hidden, run.micro * (prompt + completion), run.micro * completion
    wide, compute = (2 if run.lora else 4), (2 if run.mixed or run.lora else 4)  # of hidden states; of products
    held = {"weights": BYTES[run.bits] * linear + 2.0 * others + 4 * adapters if run.lora else 4.0 * trained}
    said = SHAPES[run.teacher or run.student]
    half, bits = run.teacher is None or run.teacher_bits < 32, run.teacher_bits if run.teacher else run.bits
    many, most, rest, _ = counts(run.teacher or run.student)
    if run.teacher:
        held["teacher"] = BYTES[bits] * many + BYTES[max(16, bits)] * rest
    held["optimizer"] = STATE[run.adam] * trained
    gradients = {"gradients": 4.0 * trained}
    before = gradients if run.rows > run.micro else {}  # those of micro-batches before

    # keys are as wide as the weights of their norm, values as the products
    cache = run.rows * layers * keys * size * (wide + compute)
    cached: dict[str, float] = {"cache": cache * (2 * prompt + completion)}
    mask = {}
    if not run.cpu:
        # where prompts differ in length there is a mask, and for it transformers repeats the keys of the layer at work
        masked = compute * (2 if wide > compute else 1)
        cached["a layer's keys, repeated"] = run.rows * (prompt + completion) * heads * size * (wide + masked)
        mask = {"mask": run.rows * prompt**2 * (1.0 + compute)}
    copies: dict[str, float] = {"logits": 3 * 4.0 * run.rows * VOCABULARY}
    if run.cpu or wide > compute:
        copies["copy of the head"] = compute * head
    if run.cpu and not run.lora:
        copies["copy of the layers"] = compute * linear
    # a 4-bit matrix is multiplied in bf16, an 8-bit one into int32
    unpacked = {4: 2.0 * most, 8: 4.0 * tokens * said[1]}.get(bits, 0.0)
    mine = {4: 2.0 * largest, 8: 4.0 * tokens * inner}.get(run.bits, 0.0) if run.lora else 0.0
    reading = body(run, run.student, run.lora, run.lora, False, run.rows * prompt)[1] + mine
    asked = body(run, run.teacher or run.student, half, False, False, tokens)[1] + unpacked
    kept, forward, backward = body(run, run.student, run.lora, run.lora, True, tokens)
    # cut out and flattened; the student's also have a float32 gradient, and that in their own type
    theirs = {"hidden states": 2.0 * states * said[0] * (2 if half else 4)}
    both = {"hidden states": theirs["hidden states"] + states * hidden * (3 * wide + 4)}
    chunk = {"chunk": min(CHUNK, states * VOCABULARY * 2.0 * (compute + 2))}
    slope = {} if run.lora else {"gradient of the head": 4.0 * head}
    return {
        "reading": held | {"cache": 1.0 * cache * prompt, "pass": reading} | mask,
        "writing": held | cached | copies,
        "teacher": held | before | {"pass": asked},
        "student": held | before | theirs | {"activations": forward + mine},
        "objective": held | before | both | {"activations": kept} | chunk | slope,
        "backward": held | before | {"activations": backward + mine} | slope,
        "update": held | gradients,
    }


def peak(run: Run, prompt: int, completion: int) -> tuple[float, str, str]:
    """Bytes, the phase, and its largest term."""
    found = phases(run, prompt, completion)
    worst = max(found, key=lambda phase: sum(found[phase].values()))
    return sum(found[worst].values()), worst, max(found[worst], key=lambda term: found[worst][term])
