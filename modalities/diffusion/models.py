"""Loading the transformers of diffusers pipelines."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...shipped import shipped


def diffusers() -> Any:
    """
    Raises:
        ModuleNotFoundError: diffusers is missing; the message names the extra.
    """
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("diffusion needs diffusers: pip install 'opd-lightning[diffusion]'") from error
    return diffusers


class Transformer:
    """Loads the transformer of a pipeline's folder, as `Pretrained` asks for it."""

    @staticmethod
    def from_pretrained(path: str, dtype: Any = "auto", quantization_config: Any = None, **settings: Any) -> nn.Module:
        """
        Raises:
            ValueError: the folder holds no pipeline with a transformer, or a setting that means nothing here.
            RuntimeError: quantisation without a GPU.
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
                raise RuntimeError(f"{path}: diffusers quantises on GPUs only; leave quantization out without one")
            same = quantization_config.to_diff_dict()
            settings["quantization_config"] = library.BitsAndBytesConfig(**same)
        dtype = torch.float32 if dtype == "auto" else dtype
        kind = getattr(library, index["transformer"][1])
        return kind.from_pretrained(path, subfolder="transformer", torch_dtype=dtype, **settings)

    @staticmethod
    def config(path: str, revision: str | None = None) -> dict[str, Any]:
        """Its configuration alone."""
        path = shipped(path)
        kind = getattr(diffusers(), pipeline_index(path, revision)["transformer"][1])
        return dict(kind.load_config(path, subfolder="transformer", revision=revision))


def pipeline_index(path: str, revision: str | None = None) -> dict[str, Any]:
    """``model_index.json``: the pipeline's class and its parts.

    Raises:
        ValueError: there is none.
    """
    try:
        return dict(diffusers().DiffusionPipeline.load_config(path, revision=revision))
    except OSError as error:
        raise ValueError(f"{path} is no folder of a diffusers pipeline (model_index.json): {error}") from error
