"""What a student or a teacher is loaded from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from .shipped import shipped


@dataclass
class Lora:
    """Low-rank adapters (peft) on a frozen base.

    Args:
        r: rank. Default 32 (ESR, 2605.27028).
        alpha: scaling numerator. Default 64 (ESR).
        dropout: default 0: a rollout and its replay must agree.
        target_modules: names or a regular expression; default: every linear layer but the head.
        adapter: start from this saved adapter instead of from zero.
    """

    r: int = 32
    alpha: int = 64
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    adapter: str | None = None


@dataclass
class Pretrained:
    """A pretrained model, by folder or hub name.

    Args:
        path: folder, hub name, or ``opd:assets/…`` for a shipped one; must hold the tokenizer (or processor) too.
        dtype: ``auto`` is float32 for weights that are trained, and what the checkpoint holds for frozen ones.
        quantization: bitsandbytes; needs the extra ``quant``. A student so loaded must be trained through ``lora``.
        lora: train adapters instead of all weights.
        freeze: a regular expression; parameters whose names it is found in are not trained and get no adapter, such as
            ``visual`` for the eyes of a Qwen3-VL.
        random_init: take only the architecture from ``path`` and draw the weights (seeded by ``seed_everything``).
        gradient_checkpointing: recompute activations in the backward pass.
        attn_implementation: passed to transformers; None lets it choose.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the checkpoint. Off unless asked for.

    Raises:
        ValueError: a quantised model is to be trained without adapters; ``freeze`` matches nothing; or a setting that
            nothing would read.
        ModuleNotFoundError: bitsandbytes is missing; the message names the extra.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["4bit", "8bit"] | None = None
    lora: Lora | None = None
    freeze: str | None = None
    random_init: bool = False
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.random_init and self.quantization:
            raise ValueError(f"random_init draws new weights: quantization={self.quantization} has nothing to quantise")

    def load(self, model_class: Any, trained: bool) -> nn.Module:
        """The model; frozen and in evaluation mode unless ``trained``, and then with adapters if ``lora`` is set."""
        if trained and self.quantization and not self.lora:
            raise ValueError(
                f"student.quantization={self.quantization}: quantised weights have no gradient; set student.lora"
            )
        if not trained and self.lora is not None and self.lora.adapter is None:
            raise ValueError("a teacher's lora needs `adapter`: fresh adapters would change nothing")
        if not trained and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing: a teacher has no backward pass to recompute anything in")
        model = self._base(model_class, trained)
        if trained:
            _never_repack(model)
        model.requires_grad_(trained and self.lora is None)
        if self.freeze is not None:
            self._freeze(model, trained)
        if self.lora is not None:
            model = self._adapt(model, trained)
        if self.gradient_checkpointing and trained:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            if self.lora is not None:
                model.enable_input_require_grads()  # type: ignore[operator]
        return model.train(trained)

    def _base(self, model_class: Any, trained: bool) -> nn.Module:
        path = shipped(self.path)
        shared: dict[str, Any] = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        if self.attn_implementation:
            shared["attn_implementation"] = self.attn_implementation
        dtype: Any = self.dtype
        if dtype == "auto" and trained and self.lora is None:
            dtype = torch.float32
        elif dtype != "auto":
            dtype = getattr(torch, dtype)
        if self.random_init:
            if not hasattr(model_class, "from_config"):
                raise ValueError(f"random_init: the transformer of {self.path} must come with weights")
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(path, **shared)
            return model_class.from_config(config).to(torch.float32 if dtype == "auto" else dtype)
        if self.quantization:
            shared["quantization_config"] = self._quantization_config()
        return model_class.from_pretrained(path, dtype=dtype, **shared)

    def _quantization_config(self) -> Any:
        if find_spec("bitsandbytes") is None:
            raise ModuleNotFoundError(
                f"quantization: {self.quantization} needs bitsandbytes: pip install 'opd-lightning[quant]'"
            )
        from transformers import BitsAndBytesConfig

        if self.quantization == "8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        compute = torch.bfloat16 if self.dtype == "auto" else getattr(torch, self.dtype)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=True,
        )

    def _freeze(self, model: nn.Module, trained: bool) -> None:
        if not trained:
            raise ValueError("freeze: no weight of a teacher is trained anyway")
        assert self.freeze is not None
        matching = [p for name, p in model.named_parameters() if re.search(self.freeze, name)]
        if not matching:
            names = sorted({name.rsplit(".", 3)[0] for name, _ in model.named_parameters()})
            raise ValueError(f"student.freeze: no parameter's name has {self.freeze!r}; there are {', '.join(names)}")
        for parameter in matching:
            parameter.requires_grad_(False)

    def _adapt(self, model: nn.Module, trained: bool) -> nn.Module:
        from peft import LoraConfig, PeftModel, get_peft_model

        assert self.lora is not None
        if self.lora.adapter is not None:
            return PeftModel.from_pretrained(model, shipped(self.lora.adapter), is_trainable=trained)
        config = LoraConfig(
            r=self.lora.r,
            lora_alpha=self.lora.alpha,
            lora_dropout=self.lora.dropout,
            target_modules=self.lora.target_modules,
            # peft wants the whole name to match
            exclude_modules=None if self.freeze is None else f".*({self.freeze}).*",
        )
        return get_peft_model(model, config)


def _never_repack(model: nn.Module) -> None:
    """On some CPUs bitsandbytes repacks 4-bit weights at the first evaluation; no gradient passes them from then on."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
