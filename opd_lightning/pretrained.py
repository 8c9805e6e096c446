"""Pretrained models, from which students and teachers are loaded, and their adapters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers.utils import cached_file

from . import gguf
from .filling import build_empty, build_outline, files_of, keeping_adapters
from .finite import Finite
from .noise import set_adapter_dropout, silence
from .remote import is_url
from .shipped import shipped


@dataclass
class Lora:
    """Low-rank adapters (peft) on a frozen base.

    Args:
        r: rank. Default 32 (ESR, 2605.27028).
        alpha: scaling numerator. Default 64 (ESR).
        dropout: default 0: a rollout and its replay must agree. Of a saved adapter, too, whatever it was saved with.
        target_modules: names or a regular expression; default: every linear layer but the head.
        adapter: start from this saved adapter instead of from zero; it brings its own rank, alpha and layers.

    Raises:
        ValueError: a saved adapter beside settings that it brings itself.
    """

    r: int = 32
    alpha: int = 64
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    adapter: str | None = None

    __setattr__ = Finite.__setattr__

    def __post_init__(self) -> None:
        for name in ("r", "alpha", "target_modules") if self.adapter is not None else ():
            if (given := getattr(self, name)) != getattr(type(self), name):
                raise ValueError(
                    f"lora.{name}={given} beside lora.adapter would be ignored: {self.adapter} brings its own; leave "
                    "one out"
                )


@dataclass
class Pretrained:
    """A pretrained model, by folder or hub name.

    Args:
        path: folder, hub name, GGUF file, or ``opd:assets/…`` for a shipped one; must hold the tokenizer (or processor)
            too.
        gguf_file: the name of a GGUF file in the folder or on the hub, instead of weights of transformers. Its weights
            are unpacked when they are loaded (float32 unless ``dtype`` is given); needs the extra ``gguf``.
        dtype: ``auto`` is float32 for weights that are trained, and what the checkpoint holds for frozen ones.
        quantization: bitsandbytes; needs the extra ``quant``. A student so loaded must be trained through ``lora``.
        lora: train adapters instead of all weights.
        freeze: a regular expression; parameters whose names it is found in are not trained and get no adapter, such as
            ``visual`` for the eyes of a Qwen3-VL.
        random_init: take only the architecture from ``path`` and draw the weights (seeded by ``seed_everything``).
        dropout: train with the dropout, layer drop and router noise that the checkpoint brings. Off unless asked for: a
            rollout has none, so a replay with it would train on other log-probs than were sampled.
        gradient_checkpointing: recompute activations in the backward pass.
        attn_implementation: passed to transformers; None lets it choose.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python code that comes with the checkpoint. Off unless asked for.

    Raises:
        ValueError: a quantized model is to be trained without adapters; ``freeze`` matches nothing; an adapter does not
            fit; a GGUF file holds no language model or is damaged; or a setting that nothing would read.
        OSError: there is no such model; the message is one sentence.
        ModuleNotFoundError: bitsandbytes or gguf is missing; the message names the extra.
    """

    path: str
    gguf_file: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["4bit", "8bit"] | None = None
    lora: Lora | None = None
    freeze: str | None = None
    random_init: bool = False
    dropout: bool = False
    gradient_checkpointing: bool = False
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    __setattr__ = Finite.__setattr__

    def __post_init__(self) -> None:
        if self.random_init and self.quantization:
            raise ValueError(f"random_init draws new weights: quantization={self.quantization} has nothing to quantize")
        if self.packed and self.quantization:
            raise ValueError(
                f"quantization={self.quantization}: {self.packed} is a GGUF file, whose weights are unpacked when they "
                "are loaded; write them as a folder first (`opd fetch` has --unpack, `opd export` writes one) and "
                "quantize that"
            )

    @property
    def packed(self) -> str | None:
        """Name of the GGUF file that the weights come from; None: they come from none."""
        return gguf.located(self.path, self.gguf_file)[1]

    @property
    def is_noisy(self) -> bool:
        """True where noise in training mode is on."""
        return self.dropout or (self.lora is not None and self.lora.dropout > 0)

    def load(self, model_class: Any, trained: bool, empty: bool = False) -> nn.Module:
        """Loads the model: frozen and in evaluation mode unless ``trained``, then with adapters if ``lora`` is set.

        ``empty``: without weights where that is possible, which `filling.fill` reads when it is cut.
        """
        # 1. settings that nothing would read
        if trained and self.quantization and not self.lora:
            raise ValueError(
                f"student.quantization={self.quantization}: quantized weights have no gradient; set student.lora"
            )
        self._check_stored(model_class, trained)
        if not trained and self.lora is not None and self.lora.adapter is None:
            raise ValueError("a teacher's lora needs `adapter`: fresh adapters would change nothing")
        if not trained and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing: a teacher has no backward pass to recompute anything in")
        if not trained and self.dropout:
            raise ValueError("dropout: a teacher is always asked in evaluation mode, where there is none")
        # 2. weights
        try:
            model = self._base(model_class, trained, empty)
        except OSError as error:  # transformers chains what the hub said, a hundred lines of it
            if isinstance(error, FileNotFoundError):
                raise
            raise OSError(f"{self.path} can't be loaded: {str(error).strip().splitlines()[0]}") from None
        except ValueError as error:  # which goes on with the names of all that there are
            if not str(error).startswith("Unrecognized configuration class"):
                raise
            kind = str(error).split(" for this kind")[0].rpartition(".")[2].rstrip(">' ")
            name = getattr(model_class, "__name__", str(model_class))
            raise ValueError(f"{self.path} holds a model with a {kind}, which {name} can't load") from None
        # 3. what is trained of them, and how
        if trained:
            _never_repack(model)
        if trained and not self.dropout:
            silence(model)
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

    def config(self) -> Any:
        """Loads transformers' configuration of the model."""
        from transformers import AutoConfig

        return self._read(AutoConfig)

    def outline(self, model_class: Any) -> nn.Module:
        """Builds the model without weights, of its configuration alone."""
        return build_outline(model_class, self.config(), trust_remote_code=self.trust_remote_code)

    def tokenizer(self) -> Any:
        """Loads transformers' tokenizer that comes with the model."""
        from transformers import AutoTokenizer

        return self._read(AutoTokenizer)

    def found(self) -> str:
        """Returns the folder or hub name, resolved where it is that of a shipped model.

        Raises:
            FileNotFoundError: it can be nothing but a folder or a GGUF file, and there is none.
            ValueError: the GGUF file there is damaged, as its header shows.
        """
        path, file = gguf.located(shipped(self.path), self.gguf_file)
        if file is not None and (Path(path).is_dir() or self.gguf_file is None) and not Path(path, file).is_file():
            raise FileNotFoundError(f"path: there is no file {Path(path, file)}")
        if file is not None and Path(path, file).is_file():
            gguf.check_header(Path(path, file))
        names_a_folder = path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path
        if names_a_folder and not Path(path).is_dir():
            elsewhere = "; models are read from this machine: copy it" if is_url(path) else ""
            raise FileNotFoundError(
                f"path: there is no folder {path}; give a folder that holds a model, or a hub name{elsewhere}"
            )
        return path

    def _check_stored(self, model_class: Any, trained: bool) -> None:
        """Refuses what a base that is stored quantized can't do.

        Raises:
            ValueError: the base is stored quantized, and is to be trained without adapters or quantized again.
        """
        self.found()
        if self.packed is not None:
            return  # its weights are unpacked
        read_config = getattr(model_class, "config", None)  # loaders of other libraries know their own configurations
        if read_config is None and not model_class.__module__.startswith("transformers."):
            return  # nobody knows how a setting's own loader stores
        try:
            config = read_config(self.path, self.revision) if read_config is not None else self.config().to_dict()
        except (OSError, ValueError):
            return  # loading it says what is wrong
        stored = quantized_as(config.get("quantization_config"))
        if stored is None:
            return
        if trained and self.lora is None:
            raise ValueError(
                f"student.path: {self.path} is stored quantized ({stored}), and such weights have no gradient; set "
                "student.lora, or take the model that it was made from"
            )
        if self.quantization or self.random_init:
            given = "random_init" if self.random_init else f"quantization={self.quantization}"
            raise ValueError(f"{given}: {self.path} is stored quantized already ({stored}); leave it out")

    def _empty(self, model_class: Any, dtype: Any, settings: dict[str, Any]) -> nn.Module | None:
        """Builds the model without weights; None where it has to be loaded."""
        folder, saved = self.found(), self.lora is not None and self.lora.adapter is not None
        ours = model_class.__module__.startswith("transformers.") and hasattr(model_class, "from_config")
        if saved or self.packed or not ours or not files_of(folder):
            return None
        config = self.config()
        if getattr(config, "quantization_config", None):
            return None
        kind = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else dtype
        settings |= {"trust_remote_code": self.trust_remote_code}
        return build_empty(model_class, config, folder, kind, **settings)

    def _base(self, model_class: Any, trained: bool, empty: bool) -> nn.Module:
        shared: dict[str, Any] = {}
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
            return model_class.from_config(self.config()).to(torch.float32 if dtype == "auto" else dtype)
        if empty and not self.quantization and (model := self._empty(model_class, dtype, dict(shared))) is not None:
            return model
        if self.quantization:
            shared["quantization_config"] = self._quantization_config()
        if self.packed is None:
            return self._read(model_class, dtype=dtype, **shared)
        if not model_class.__module__.startswith("transformers."):
            raise ValueError(f"path: {self.packed} is a GGUF file, and only models of transformers are read from those")
        model, loading = self._read(model_class, dtype=dtype, output_loading_info=True, **shared, **gguf.unpacked())
        gguf.check_complete(self.packed, loading["missing_keys"])
        gguf.check_read(self.packed, str(cached_file(self.found(), self.packed, revision=self.revision)), model)
        gguf.forget_packing(model)
        # what an adapter will name as its base: the file, where transformers has the folder that it lies in
        model.name_or_path = self.path if self.gguf_file is None else f"{self.path}/{self.gguf_file}"
        return model

    def _read(self, kind: Any, **settings: Any) -> Any:
        """Calls ``from_pretrained`` of a class of transformers with what locates the model."""
        settings |= {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        file = self.packed
        if file is None:
            return kind.from_pretrained(self.found(), **settings)
        with gguf.reading(file):
            return kind.from_pretrained(self.found(), gguf_file=file, **settings)

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
        from peft import LoraConfig, get_peft_model

        assert self.lora is not None
        if self.lora.adapter is not None:
            from .saved_adapter import load_saved

            model = load_saved(model, shipped(self.lora.adapter), trained)
            set_adapter_dropout(model, self.lora.dropout)
            return model
        config = LoraConfig(
            r=self.lora.r,
            lora_alpha=self.lora.alpha,
            lora_dropout=self.lora.dropout,
            target_modules=self.lora.target_modules,
            # peft wants the whole name to match
            exclude_modules=None if self.freeze is None else f".*({self.freeze}).*",
        )
        with keeping_adapters(model):
            return get_peft_model(model, config)


def quantized_as(settings: Any) -> str | None:
    """Describes the method of a ``quantization_config``, an object or as in config.json; None without one."""
    if not settings:
        return None
    values = settings if isinstance(settings, dict) else settings.to_dict()
    method = values.get("quant_method") or "an unknown method"
    bits = values.get("bits") or (4 if values.get("load_in_4bit") else 8 if values.get("load_in_8bit") else None)
    return f"{getattr(method, 'value', method)}{f', {bits} bit' if bits else ''}"


def _never_repack(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on some CPUs at the first evaluation: that ends all gradients."""
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
