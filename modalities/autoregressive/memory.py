"""The memory of one training step of a model that writes tokens, phase by phase and term by term.

What a model's body keeps and needs is counted: transformers' and peft's own code runs forward and backward with tensors
that have a size and no storage. The rest is arithmetic on the shapes. docs/performance.md says how far off it was.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AutoConfig, AutoModel

from ...forecast import STATE
from ...live import NOTHING, LiveBytes, Taken

CHUNK_MIB = 192
"""Default of ``Objective.chunk_mib``."""
GRID = (64, 1024, 40_960)
"""Tokens of the passes that are counted for a GPU; between and beyond them lines are straight. A CPU's are counted."""
# Per weight: int8 with a float32 scale per row is 1 byte; nf4 has a byte per 64 weights and double quantization
BYTES = {32: 4.0, 16: 2.0, 8: 1.0, 4: 0.5 + 1 / 64 + 4 / (64 * 256)}


@dataclass(frozen=True)
class Shape:
    """Shape of the body of a decoder.

    Attributes:
        text: transformers' configuration of the part that reads text, as JSON.
        beside: weights of other parts, such as the eyes.
        frozen: of these, the ones that are not trained.
    """

    text: str
    beside: int = 0
    frozen: int = 0

    @classmethod
    def of(cls, config: Any, beside: int = 0, frozen: int = 0) -> Shape:
        """Takes the shape from a configuration of transformers."""
        return cls(json.dumps(config.get_text_config().to_dict(), sort_keys=True, default=str), beside, frozen)

    @property
    def config(self) -> Any:
        """Configuration of transformers."""
        return _config(self.text)

    @property
    def hidden(self) -> int:
        """Size of a hidden state."""
        return int(self.config.hidden_size)

    @property
    def inner(self) -> int:
        """Width of the layers' widest product."""
        return int(getattr(self.config, "intermediate_size", None) or 4 * self.hidden)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.config.num_hidden_layers)

    @property
    def heads(self) -> int:
        """Number of heads that ask."""
        return int(self.config.num_attention_heads)

    @property
    def keys(self) -> int:
        """Number of heads that have keys and values."""
        return int(getattr(self.config, "num_key_value_heads", None) or self.heads)

    @property
    def size(self) -> int:
        """Size of a head."""
        return int(getattr(self.config, "head_dim", None) or self.hidden // self.heads)

    @property
    def head(self) -> int:
        """Weights of the projection to logits."""
        return int(self.config.vocab_size) * self.hidden


@cache
def _config(text: str) -> Any:
    values = json.loads(text)
    return AutoConfig.for_model(values.pop("model_type"), **{k: v for k, v in values.items() if k != "dtype"})


def built(shape: Shape, dtype: torch.dtype, lora: int, layers: int | None = None) -> Any:
    """Builds the body without contents, with fewer layers if asked; ``lora``: the rank of adapters, 0 for none."""
    config = _config(shape.text)
    if layers is not None:
        values = {**json.loads(shape.text), "num_hidden_layers": layers}
        if kinds := values.get("layer_types"):
            values["layer_types"] = (kinds * layers)[:layers]
        config = _config(json.dumps(values, sort_keys=True))
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=dtype)
        return get_peft_model(model, LoraConfig(r=lora, target_modules="all-linear")) if lora else model


@cache
def counts(shape: Shape, lora: int) -> tuple[int, int, int, int]:
    """Counts weights of the layers' matrices, of the largest of them, all others, and those of adapters of a rank.

    Of models whose layers are alike; other parts and an untied head are among the others.
    """
    sums = []
    for layers in (1, 2):
        model = built(shape, torch.bfloat16, lora or 8, layers)
        linear = [m.base_layer.weight.numel() for m in model.modules() if hasattr(m, "base_layer")]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in model.parameters())
        sums.append(np.array([sum(linear), max(linear), everything - sum(linear) - trained, trained if lora else 0]))
    matrices, _, others, adapters = (int(n) for n in sums[0] + (sums[1] - sums[0]) * (shape.layers - 1))
    others += shape.beside + (0 if getattr(shape.config, "tie_word_embeddings", True) else shape.head)
    return matrices, int(sums[1][1]), others, adapters


@cache
def passed(
    shape: Shape,
    half: bool,
    lora: int,
    mixed: bool,
    checkpointing: bool,
    train: bool,
    gradients: bool,
    layers: int,
    n: int,
) -> tuple[int, int, int]:
    """Counts bytes beside the weights for a pass of n tokens through the body.

    Kept after the forward pass, most in it, and most in the backward pass, gradients included unless there are some
    from micro-batches before (``gradients``).
    """
    # 1. a model whose tensors have a size and no storage
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated.*")  # transformers' own names
    model = built(shape, torch.bfloat16 if half else torch.float32, lora, layers).train(train)
    with FakeTensorMode():
        for module in model.modules():
            for key, weight in list(module.named_parameters(recurse=False)):
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                setattr(module, key, nn.Parameter(empty, weight.requires_grad))
            for key, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, key, torch.empty(buffer.shape, dtype=buffer.dtype))
        if checkpointing and train:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if lora:
                model.enable_input_require_grads()
        weights = [*model.parameters(), *model.buffers()]
        for weight in weights:
            if gradients and weight.requires_grad:
                weight.grad = torch.empty_like(weight)
        body = model.get_base_model() if lora else model
        ids = torch.zeros(1, n, dtype=torch.long)
        # tensors without contents would be given a mask of n × n that real ones of one length do without
        kinds = set(getattr(shape.config, "layer_types", None) or ())
        narrow = torch.ones(1, 1, 1, n, dtype=torch.bool)
        mask = dict.fromkeys(kinds) if kinds else narrow
        # 2. what its passes keep and need
        with LiveBytes([*weights, *(w.grad for w in weights if w.grad is not None), ids, narrow]) as live:
            with torch.autocast("cpu", torch.bfloat16, mixed, cache_enabled=False), torch.set_grad_enabled(train):
                out = body(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            kept, forward, live.peak = live.now, live.peak, live.now
            if train:
                out.backward(torch.empty_like(out))
            return kept, forward, live.peak


@dataclass(frozen=True)
class Plan:
    """Plan of a step: what decides how much memory it takes. Implements `forecast.Forecast`.

    Attributes:
        student, teacher: shapes; ``teacher`` None is the student's own model, or none.
        others: shapes and bits of further teachers, whose weights wait while the largest one is asked.
        copies: of the student: those of teachers that began as it, and of whoever acts ahead of training.
        prompt, completion: tokens of a row.
        lora: rank of adapters; 0: all weights are trained.
        bits: of a LoRA student's base; what is trained is float32.
        teacher_bits: of the teacher's weights.
        adam: bits of the optimizer's moments.
        rows: trajectories of a generation batch.
        micro: trajectories of a micro-batch.
        checkpointing: whether layers are computed again in the backward pass.
        mixed: ``trainer.precision`` is bf16-mixed rather than 32-true.
        cpu: whether it runs on a CPU, where rollouts copy layers.
        pass_tokens: the most tokens of a pass; None: no limit.
        chunk_mib: of logits that are open at once.
        eyes, teacher_eyes: what a row's images take in a pass, beside its tokens.
        pixels: bytes of a row's images, as the model reads them.
        about: what was assumed.
    """

    student: Shape
    teacher: Shape | None
    prompt: int
    completion: int
    lora: int = 0
    bits: int = 16
    teacher_bits: int = 16
    adam: int = 32
    rows: int = 8
    micro: int = 1
    checkpointing: bool = True
    mixed: bool = True
    cpu: bool = False
    pass_tokens: int | None = None
    chunk_mib: int = CHUNK_MIB
    others: tuple[tuple[Shape, int], ...] = ()
    copies: int = 0
    eyes: Taken = NOTHING
    teacher_eyes: Taken = NOTHING
    pixels: float = 0.0
    about: str = ""

    def phases(self) -> dict[str, dict[str, float]]:
        """Computes what lives in each phase of a step, term by term, in bytes; the peak is the largest sum."""
        # 1. what is there all along
        own, asking = self.student, self.teacher or self.student
        linear, largest, others, adapters = counts(own, self.lora)
        trained = adapters if self.lora else linear + others - own.frozen
        vocabulary, tokens, states = own.config.vocab_size, self.micro * self.length, self.micro * self.completion
        wide = 2 if self.lora and self.bits < 32 else 4  # of hidden states
        compute = 2 if self.mixed or wide == 2 else 4  # of products
        base = BYTES[self.bits] * linear + BYTES[max(16, self.bits)] * others + 4 * adapters
        held = {"weights": base if self.lora else 4.0 * (linear + others)}
        half, bits = self._teacher_is_half, self.teacher_bits if self.teacher else self.bits
        _, most, _, _ = counts(asking, 0)
        if self.teacher:
            held["teacher"] = _stored(asking, bits)
        if self.others:
            held["other teachers"] = sum(_stored(shape, of_one) for shape, of_one in self.others)
        if self.copies:
            held["copies of the student"] = self.copies * held["weights"]
        held["optimizer"] = STATE[self.adam] * trained
        gradients = {"gradients": 4.0 * trained}
        before = gradients if self.rows > self.micro else {}  # those of micro-batches before
        # 2. rollouts: keys are as wide as the weights of their norm, values as the products
        cache_of_one = self.rows * own.layers * own.keys * own.size * (wide + compute)
        cached: dict[str, float] = {"cache": cache_of_one * (2 * self.prompt + self.completion)}
        mask = {}
        if not self.cpu:
            # where prompts differ in length there is a mask, for which the keys of the layer at work are repeated
            masked = compute * (2 if wide > compute else 1)
            cached["a layer's keys, repeated"] = self.rows * self.length * own.heads * own.size * (wide + masked)
            mask = {"mask": self.rows * self.prompt**2 * (1.0 + compute)}
        copies: dict[str, float] = {"logits": 3 * 4.0 * self.rows * vocabulary}
        if self.cpu or wide > compute:
            copies["copy of the head"] = compute * own.head
        if self.cpu and not (self.lora and compute == 2):  # where adapters are merged into it, but for half precision
            copies["copy of the layers"] = compute * linear
        # 3. passes: a 4-bit matrix is multiplied in bf16, an 8-bit one into int32
        unpacked = {4: 2.0 * most, 8: 4.0 * tokens * asking.inner}.get(bits, 0.0)
        dequantized = {4: 2.0 * largest, 8: 4.0 * tokens * own.inner}.get(self.bits, 0.0) if self.lora else 0.0
        reading = self._body(own, wide == 2, self.lora, False, self.rows * self.prompt)[1] + dequantized
        asked = self._body(asking, half, 0, False, tokens)[1] + unpacked
        kept, forward, backward = self._body(own, wide == 2, self.lora, True, tokens)
        # 4. images, of the rows that are read at once
        pixels = {"pixels": self.micro * self.pixels} if self.pixels else {}

        def looked(taken: float, rows: int) -> dict[str, float]:
            return {"eyes": rows * taken} if taken else {}

        prompts = {"pixels": self.rows * self.pixels} | looked(self.eyes.forward, self.rows) if self.pixels else {}
        # 5. the objective: hidden states cut out and flattened, the student's with a gradient; one chunk; the head
        of_teacher = {"hidden states": 2.0 * states * asking.hidden * (2 if half else 4)}
        both = {"hidden states": of_teacher["hidden states"] + states * own.hidden * (3 * wide + 4)}
        chunk = {"chunk": min(self.chunk_mib * 2.0**20, states * vocabulary * 2.0 * (compute + 2))}
        slope = {} if self.lora else {"gradient of the head": 4.0 * own.head}
        return {
            "reading": held | {"cache": 1.0 * cache_of_one * self.prompt, "pass": reading} | mask | prompts,
            "writing": held | cached | copies,
            "teacher": held | before | {"pass": asked} | looked(self.teacher_eyes.forward, self.micro) | pixels,
            "student": held
            | before
            | of_teacher
            | {"activations": forward + dequantized}
            | looked(self.eyes.forward, self.micro)
            | pixels,
            "objective": held
            | before
            | both
            | {"activations": kept}
            | chunk
            | slope
            | looked(self.eyes.kept, self.micro),
            "backward": held
            | before
            | {"activations": backward + dequantized}
            | slope
            | looked(self.eyes.backward, self.micro),
            "update": held | gradients,
        }

    def cheaper(self) -> Mapping[str, Plan]:
        """Turns the knobs that a configuration has for memory, one at a time."""
        others: dict[str, Plan] = {}
        if not self.checkpointing:
            others["model.student.gradient_checkpointing: true"] = replace(self, checkpointing=True)
        if self.micro > 1:
            factor = self.rows // self.micro
            key = f"trainer.accumulate_grad_batches: {2 * factor} (micro-batches of {self.micro // 2})"
            others[key] = replace(self, micro=self.micro // 2)
        if not self.lora:
            others["model.student.lora: {r: 32, alpha: 64}"] = replace(self, lora=32)
        elif self.bits > 4:
            others["model.student.quantization: 4bit"] = replace(self, bits=4)
        if self.teacher is not None and self.teacher_bits > 4:
            others["a teacher in 4bit (weights.pretrained.quantization)"] = replace(self, teacher_bits=4)
        if self.adam > 8 and not self.lora:
            others["optimizer: bitsandbytes.optim.AdamW8bit"] = replace(self, adam=8)
        if self.completion > 1:
            key = f"model.rollout.horizon: {self.completion // 2}"
            others[key] = replace(self, completion=self.completion // 2)
        if self.rows > 1:
            half = max(1, self.rows // 2)
            others["half of model.rollout.batch_size"] = replace(self, rows=half, micro=min(self.micro, half))
        return others

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.completion

    @property
    def _teacher_is_half(self) -> bool:
        return self.teacher_bits < 32 if self.teacher else bool(self.lora) and self.bits < 32

    def _body(self, shape: Shape, half: bool, lora: int, train: bool, n: int) -> tuple[float, ...]:
        """Counts `passed` for all layers, of which a few are run; passes that are limited keep what each keeps."""
        limit = max(self.pass_tokens, self.length) if self.pass_tokens else n
        one = self._straight(shape, half, lora, train, min(n, limit))
        if n <= limit:
            return one
        # all passes are kept until the backward pass, and one is at work
        kept = one[0] * n / limit
        return kept, kept + one[1] - one[0], kept + one[2] - one[0]

    def _straight(self, shape: Shape, half: bool, lora: int, train: bool, n: int) -> tuple[float, ...]:
        settings = (shape, half, lora, self.mixed, self.checkpointing, train, self.rows > self.micro)
        grid = [n] if self.cpu else [*GRID]
        few, more = (np.array([passed(*settings, some, tokens) for tokens in grid], float).T for some in (2, 3))
        lines = [a + (b - a) * (shape.layers - 2) for a, b in zip(few, more, strict=True)]
        return tuple(_at(n, grid, line) for line in lines)


def _stored(shape: Shape, bits: int) -> float:
    """Computes the bytes of a teacher's weights."""
    matrices, _, others, _ = counts(shape, 0)
    return BYTES[bits] * matrices + BYTES[max(16, bits)] * others


def _at(n: int, grid: list[int], values: Any) -> float:
    """Reads a line at n, straight beyond its last two points."""
    if len(grid) == 1 or n <= grid[-1]:
        return float(np.interp(n, grid, values))
    slope = (values[-1] - values[-2]) / (grid[-1] - grid[-2])
    return float(values[-1] + slope * (n - grid[-1]))
