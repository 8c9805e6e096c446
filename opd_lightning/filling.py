"""Models that are cut before they are filled: built without weights, of which each rank then reads its slices.

So no process ever holds a whole model; what takes the time and memory of loading is spread over the ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def files_of(folder: str) -> dict[str, Path]:
    """Finds the file of each weight in a folder of transformers; empty where there are no safetensors."""
    path = Path(folder)
    if (path / INDEX).is_file():
        places = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: path / file for name, file in places.items()}
    if not (path / SINGLE).is_file():
        return {}
    with safe_open(path / SINGLE, "pt") as file:
        return dict.fromkeys(file.keys(), path / SINGLE)


def build_empty(model_class: Any, config: Any, folder: str, dtype: torch.dtype, **settings: Any) -> nn.Module | None:
    """Builds a model of transformers without weights, which are left to `fill`; buffers are there.

    Args:
        model_class: one of transformers' ``AutoModelFor…``.
        config: of the model.
        folder: with its weights.
        dtype: of the weights.
        settings: for ``from_config``.

    Returns:
        None where its weights have other names or shapes in the files: it has to be loaded whole.
    """
    files = files_of(folder)
    model: Any = build_outline(model_class, config, dtype=dtype, **settings)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    if not shapes.keys() <= files.keys() or any(_shape(files[name], name) != shape for name, shape in shapes.items()):
        return None
    if model.can_generate() and (Path(folder) / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    model.unfilled = files
    return model.eval()


def build_outline(model_class: Any, config: Any, **settings: Any) -> nn.Module:
    """Builds a model of transformers that has no weights and gets none: what its configuration says of it."""
    with isolate_rng(), _without_weights():
        model: Any = model_class.from_config(config, **settings)
        model.tie_weights()
    return model.eval()


def _shape(file: Path, name: str) -> list[int]:
    with safe_open(file, "pt") as weights:
        shape: list[int] = weights.get_slice(name).get_shape()
    return shape


@contextmanager
def _without_weights() -> Iterator[None]:
    """Lets modules that are built within have parameters on no device."""
    plain = nn.Module.register_parameter

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        plain(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":  # else it is tied to one that is there
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = empty  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


@contextmanager
def keeping_adapters(model: nn.Module) -> Iterator[None]:
    """Lets adapters that are put on a model without weights have theirs: PEFT would send them to no device, too."""
    if not is_unfilled(model):
        yield
        return
    plain = nn.Module.to

    def to(module: nn.Module, *args: Any, **keywords: Any) -> nn.Module:
        nowhere = any(str(value) == "meta" for value in (*args, *keywords.values()))
        return module if nowhere else plain(module, *args, **keywords)

    nn.Module.to = to  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.to = plain  # type: ignore[method-assign]


def is_unfilled(model: Any) -> bool:
    """Tells whether a model has no weights yet."""
    return bool(getattr(_base(model), "unfilled", None))


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


@torch.no_grad()
def fill(model: nn.Module, device: torch.device) -> None:
    """Reads this rank's slices of the weights of a model that was built without any, and then cut."""
    base = _base(model)
    files: dict[str, Path] = base.unfilled
    # 1. room for the slices; ties stay where parameters are changed in place
    in_place = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        base._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t.to(device))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(in_place)
    # 2. what belongs into it; adapters have theirs
    for name, parameter in base.named_parameters():
        stored = name.replace(".base_layer.", ".")
        if stored in files:
            _read(files[stored], stored, parameter)
    base.unfilled = None


def _read(file: Path, name: str, parameter: Tensor) -> None:
    with safe_open(file, "pt") as weights:
        if not isinstance(parameter, DTensor):
            parameter.copy_(weights.get_tensor(name))
            return
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if all(shape):
            rows = slice(offset[0], offset[0] + shape[0])
            parameter.to_local().copy_(weights.get_slice(name)[rows])
