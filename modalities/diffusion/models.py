"""Loading the transformers of diffusers pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from ...printable import printable
from ...shipped import shipped


def diffusers() -> Any:
    """Imports diffusers.

    Raises:
        ModuleNotFoundError: diffusers is missing; the message names the extra.
    """
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("diffusion needs diffusers: pip install 'opd-lightning[diffusion]'") from error
    return diffusers


class Transformer:
    """Loader of the transformer of a pipeline's folder, as `Pretrained` calls it."""

    @staticmethod
    def from_pretrained(path: str, dtype: Any = "auto", quantization_config: Any = None, **settings: Any) -> nn.Module:
        """Loads the weights.

        Raises:
            ValueError: the folder holds no pipeline with a transformer, or a setting that means nothing here.
            RuntimeError: quantization without a GPU.
        """
        for name in ("attn_implementation", "trust_remote_code"):
            if settings.get(name):
                raise ValueError(f"{path}: {name} means nothing to a transformer of diffusers; leave it out")
        library, settings = diffusers(), {"revision": settings.get("revision")}
        index = pipeline_index(path, settings["revision"])
        if "transformer" not in index:
            raise ValueError(f"{path}: a {index['_class_name']} has no transformer; it has {', '.join(index)}")
        if quantization_config is not None:
            if not torch.cuda.is_available():
                raise RuntimeError(f"{path}: diffusers quantizes on GPUs only; leave quantization out without one")
            same = quantization_config.to_diff_dict()
            settings["quantization_config"] = library.BitsAndBytesConfig(**same)
        dtype = torch.float32 if dtype == "auto" else dtype
        kind = getattr(library, index["transformer"][1])
        return kind.from_pretrained(path, subfolder="transformer", torch_dtype=dtype, **settings)

    @staticmethod
    def stored_dtype(path: str, revision: str | None = None, part: str = "transformer") -> torch.dtype | None:
        """Returns the dtype in which a part's weights are stored; None where they are not here as safetensors."""
        folder = Path(shipped(path))
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(path, revision=revision, local_files_only=True))
            except (OSError, ValueError):
                return None
        for file in sorted((folder / part).glob("*.safetensors")):
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118  (it can't be iterated over)
                    return weights.get_tensor(name).dtype
        return None

    @staticmethod
    def config(path: str, revision: str | None = None) -> dict[str, Any]:
        """Loads its configuration alone."""
        path = shipped(path)
        kind = getattr(diffusers(), pipeline_index(path, revision)["transformer"][1])
        return dict(kind.load_config(path, subfolder="transformer", revision=revision))


def save_pipeline(pipe: Any, model: nn.Module, folder: Path, path: str, revision: str | None) -> None:
    """Writes a pipeline's folder with another transformer, each other part in the dtype that ``path`` stores it in."""
    for name, module in pipe.components.items():
        dtype = Transformer.stored_dtype(path, revision, name)
        if isinstance(module, nn.Module) and dtype is not None:
            module.to(dtype)  # diffusers loads all of them in float32
    kind, parts = type(pipe), {**pipe.components, "transformer": model}
    kind(**parts).save_pretrained(folder)
    for file in folder.glob("*/config.json"):  # diffusers writes down where the parts came from on this machine
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_adapter(pipe: Any, model: PeftModel, folder: Path) -> None:
    """Writes the adapter of a transformer as ``load_lora_weights`` of its pipeline reads it.

    Raises:
        ValueError: the pipeline loads no adapters, or none of this kind.
    """
    config = model.peft_config["default"]
    kinds = {"use_dora": "DoRA", "modules_to_save": "whole modules", "lora_bias": "biases"}
    for setting, kind in kinds.items():
        if getattr(config, setting):
            raise ValueError(f"adapters with {kind} are nothing that diffusers loads; export with --merge=true")
    if not hasattr(pipe, "save_lora_weights"):
        raise ValueError(f"a {type(pipe).__name__} of diffusers loads no adapters; export with --merge=true")
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    settings["base_model_name_or_path"] = None  # a folder of this machine, often
    layers = get_peft_model_state_dict(model)
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers={name.removeprefix("base_model.model."): layer for name, layer in layers.items()},
        transformer_lora_adapter_metadata=settings,
    )


def with_adapter(path: str, revision: str | None, folder: Path) -> nn.Module:
    """Loads the transformer of a pipeline with an adapter of `save_adapter`, as diffusers does."""
    pipe = diffusers().DiffusionPipeline.from_pretrained(shipped(path), revision=revision)
    pipe.load_lora_weights(folder)
    return pipe.transformer.eval()


def pipeline_index(path: str, revision: str | None = None) -> dict[str, Any]:
    """Reads ``model_index.json``: the pipeline's class and its parts.

    Raises:
        ValueError: there is none, or it names other code than that of diffusers and transformers, which loading it
            would import.
    """
    try:
        index = dict(diffusers().DiffusionPipeline.load_config(path, revision=revision))
    except OSError as error:
        raise ValueError(f"{path} is no folder of a diffusers pipeline (model_index.json): {error}") from error
    for name, component in index.items():
        if isinstance(component, list | tuple) and component[0] not in (None, "diffusers", "transformers"):
            raise ValueError(f"{path}: its {name} is code of {printable(component[0])}, which is not imported")
    return index
