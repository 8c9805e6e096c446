"""Dropout and other noise of training mode that a checkpoint brings: off, so that a rollout and its replay agree."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

# What routers add in training mode
JITTER = {"jitter_noise", "input_jitter_noise", "moe_jitter_eps"}
# Of routers that draw experts in training mode, and read their rate in evaluation, too (PhiMoE)
DRAWING = "router_jitter_noise"


def silence(model: nn.Module) -> None:
    """Sets every dropout, layer drop and router jitter of the model to 0, in place; its ``config`` stays as it was.

    Layers that read such a rate from the configuration itself (Falcon, Persimmon) get a copy of it; routers that draw
    experts stay in evaluation mode.
    """
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name in _rates(module):
            setattr(module, name, 0.0)
        if hasattr(module, DRAWING):
            module.register_forward_pre_hook(_in_evaluation)
        config = vars(module).get("config")
        # a layer's, and not the model's own, which is written on export
        if hasattr(config, "to_dict") and not hasattr(module, "save_pretrained"):
            module.config = copies.setdefault(id(config), _without_rates(config))


def noise(model: nn.Module) -> float:
    """Returns the largest rate of any dropout, layer drop or router jitter that is on in training mode, or 0."""
    rates = [getattr(module, name) for module in model.modules() for name in _rates(module)]
    return max(rates, default=0.0)


def set_adapter_dropout(model: nn.Module, rate: float) -> None:
    """Gives every LoRA layer this dropout, whatever its adapter was saved with."""
    for module in model.modules():
        places: Any = getattr(module, "lora_dropout", None)
        if isinstance(places, nn.ModuleDict):
            for name in places:
                places[name] = nn.Dropout(rate) if rate else nn.Identity()


def _rates(module: nn.Module) -> Iterator[str]:
    if isinstance(module, _DropoutNd) and module.p:
        yield "p"
    yield from [name for name, value in vars(module).items() if _is_rate(name, value)]


def _is_rate(name: str, value: Any) -> bool:
    return isinstance(value, float) and value > 0 and ("drop" in name or name in JITTER)


def _in_evaluation(module: nn.Module, inputs: Any) -> None:
    module.training = False


def _without_rates(config: Any) -> Any:
    quiet = copy.copy(config)
    for name in [name for name, value in vars(config).items() if _is_rate(name, value)]:
        setattr(quiet, name, 0.0)
    return quiet
