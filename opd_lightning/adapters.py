"""Several policies in one set of weights: LoRA adapters switched on and off, and the average of an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .sharding import put_away, slice_of, sliced_like, whole

STUDENT = "default"


@contextmanager
def only_adapters(model: nn.Module, *names: str) -> Iterator[None]:
    """Within it, exactly the named adapters act (none: the bare base).

    peft's own switches also flip ``requires_grad``, which would freeze the student's adapter in mid-step.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters, layer._active_adapter = not names, list(names)
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def does_something(model: nn.Module) -> bool:
    """Whether the student's adapter changes the base at all; a fresh one does not."""
    factors = (p for name, p in model.named_parameters() if ("lora_B" in name or "lora_embedding_B" in name))
    return any(bool(factor.any()) for factor in factors)


def average_product(
    left: Tensor, right: Tensor, new_left: Tensor, new_right: Tensor, rate: float, rank: int
) -> tuple[Tensor, Tensor]:
    """The best rank-``rank`` factors of (1−rate)·left·right + rate·new_left·new_right.

    Averaging the factors one by one is not averaging their product: it is off by the covariance of the two.

    Args:
        left, right: ``[out, R]`` and ``[R, in]``.
        new_left, new_right: ``[out, r]`` and ``[r, in]``.

    Returns:
        ``[out, rank]`` and ``[rank, in]``.
    """
    tall = torch.cat([(1 - rate) * left, rate * new_left], 1)
    wide = torch.cat([right, new_right], 0)
    q_out, r_out = torch.linalg.qr(tall)
    q_in, r_in = torch.linalg.qr(wide.T)
    u, s, v = torch.linalg.svd(r_out @ r_in.T)
    root = s.sqrt()[:rank]
    found = len(root)
    new = tall.new_zeros(tall.shape[0], rank), wide.new_zeros(rank, wide.shape[1])
    new[0][:, :found] = q_out @ u[:, :found] * root
    new[1][:found] = (q_in @ v[:found].T * root).T
    return new


class AverageAdapter:
    """A second adapter that follows the exponential moving average of what the student's adapter *does*, B·A.

    It starts as the student's adapter. The average of products has a growing rank, so the adapter has twice the
    student's and keeps the best approximation.

    Raises:
        ValueError: the student's adapter has parts other than linear LoRA (embeddings, DoRA, whole trained modules).
    """

    def __init__(self, model: PeftModel, name: str) -> None:
        self.name, self._model = name, model
        config: Any = model.peft_config[STUDENT]
        if getattr(config, "use_dora", False) or getattr(config, "modules_to_save", None):
            raise ValueError(
                "a teacher in an adapter of its own supports plain LoRA only (no DoRA, no modules_to_save)"
            )
        rank = 2 * config.r
        plain: dict[str, Any] = {
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "init_lora_weights": True,
        }
        model.add_adapter(name, dataclasses.replace(config, r=rank, lora_alpha=rank, lora_dropout=0.0, **plain))
        self.layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for layer in self.layers:
            if not isinstance(layer, LoraLinear) and type(layer).__module__.rpartition(".")[2] != "bnb":
                raise ValueError(
                    f"a teacher in an adapter of its own supports linear layers only, not {type(layer).__name__}"
                )
            layer.lora_A[name].requires_grad_(False)
            layer.lora_B[name].requires_grad_(False)
        self.update(1.0)

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """average ← (1−rate)·average + rate·student, of the products."""
        put_away(self._model)
        for layer in self.layers:
            a, b = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
            scaling = layer.scaling[STUDENT]
            left, right = average_product(
                whole(b).float(),
                whole(a).float(),
                whole(layer.lora_B[STUDENT].weight).float() * scaling,
                whole(layer.lora_A[STUDENT].weight).float(),
                rate,
                rank=a.shape[0],
            )
            slice_of(b).copy_(slice_of(sliced_like(b, left)))
            slice_of(a).copy_(slice_of(sliced_like(a, right)))
