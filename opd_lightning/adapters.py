"""Several policies in one set of weights: LoRA adapters switched on and off, and the average of an adapter."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .filling import keeping_adapters
from .sharding import reshard, slice_of, sliced_like, unsharded

STUDENT = "default"
SWITCHED: Any = (BaseTunerLayer, AuxiliaryTrainingWrapper)
"""Layers with weights per adapter: LoRA and its relatives, whole modules that are trained, single tokens."""


@contextmanager
def only_adapters(model: nn.Module, *names: str) -> Iterator[None]:
    """Switches to exactly the named adapters within a block (none: the bare base).

    peft's own switches also flip ``requires_grad``, which would freeze the student's adapter in mid-step.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, SWITCHED)]
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        layer._disable_adapters, layer._active_adapter = not names, list(names)
    try:
        yield
    finally:
        for layer, (disabled, active) in zip(layers, before, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


def adapter_parameters(model: nn.Module, *adapters: str) -> dict[str, nn.Parameter]:
    """Collects the parameters of some adapters (default: all), by name, in all layers that `only_adapters` switches."""
    wanted = set(adapters or getattr(model, "peft_config", ()))
    return {
        f"{where}.{name}": parameter
        for where, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, SWITCHED)
        for name, parameter in layer.named_parameters(remove_duplicate=False)
        if wanted & set(name.split("."))
    }


def differs_from_base(model: PeftModel) -> bool:
    """Tells whether the student's adapter may change the base; a fresh LoRA, whose second factors are 0, does not."""
    parameters = adapter_parameters(model, STUDENT)
    return any(
        bool(p.any()) for name, p in parameters.items() if ".lora_A." not in name and ".lora_embedding_A." not in name
    )


class AnotherAdapter:
    """Second adapter beside the student's, which is never trained and acts where it is switched to.

    Args:
        model: the student.
        name: of the new adapter.
        changes: to the settings of the student's adapter (`peft.LoraConfig`).

    Raises:
        ValueError: the student trains something that no second adapter can hold, such as biases of the base.
    """

    def __init__(self, model: PeftModel, name: str, **changes: Any) -> None:
        self.name, self._model = name, model
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        beyond = trained.keys() - adapter_parameters(model, STUDENT).keys()
        if beyond:
            raise ValueError(
                f"model.teachers.{name}: what the student was, or is on average, is kept in an adapter of its own; the "
                f"student also trains {min(beyond)}, which adapters do not switch (`bias` of its adapter?)"
            )
        # other ways to begin, such as PiSSA, would change the base
        config: Any = model.peft_config[STUDENT]
        config = dataclasses.replace(config, init_lora_weights=True, **changes)
        with keeping_adapters(model):
            model.add_adapter(name, config)
        for parameter in adapter_parameters(model, name).values():
            parameter.requires_grad_(False)
        for parameter in trained.values():  # peft may have frozen them
            parameter.requires_grad_(True)

    def pairs(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Pairs each parameter of this adapter with the student's in its place, by the name of the student's."""
        copies, students = (adapter_parameters(self._model, name) for name in (self.name, STUDENT))
        return {name: (copies[_renamed(name, self.name)], parameter) for name, parameter in students.items()}


class CopiedAdapter(AnotherAdapter):
    """Copy of the student's adapter as it is now, whatever it holds: LoRA of any scaling, DoRA, modules, tokens."""

    @torch.no_grad()
    def __init__(self, model: PeftModel, name: str) -> None:
        super().__init__(model, name)
        for copy, students in self.pairs().values():
            copy.copy_(students)


def merged(model: PeftModel) -> nn.Module:
    """Folds the student's adapter into the base, in place.

    A weight that an adapter changes in one of several places, such as a head that is also the embedding, becomes one of
    its own there.
    """
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        base: Any = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if weight is not None and places[id(weight)] > 1:
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            _say_untied(model.get_base_model())
    return model.merge_and_unload()


def _say_untied(model: Any) -> None:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def _is_factor(parameter: str) -> bool:
    return {"lora_A", "lora_B"} & set(parameter.split(".")) != set()


def _renamed(parameter: str, adapter: str) -> str:
    """Renames a parameter of the student's adapter to its name in another one."""
    parts = parameter.split(".")
    last = max(i for i, name in enumerate(parts) if name == STUDENT)
    return ".".join([*parts[:last], adapter, *parts[last + 1 :]])


def average_product(
    left: Tensor, right: Tensor, new_left: Tensor, new_right: Tensor, rate: float, rank: int
) -> tuple[Tensor, Tensor]:
    """Computes the best rank-``rank`` factors of (1−rate)·left·right + rate·new_left·new_right.

    Averaging the factors one by one is not averaging their product: it is off by the covariance of the two.

    Args:
        left, right: ``[out, R]`` and ``[R, in]``.
        new_left, new_right: ``[out, r]`` and ``[r, in]``.

    Returns:
        ``[out, rank]`` and ``[rank, in]``.
    """
    # QR of both sides leaves an SVD of size R + r, however large the layer
    tall = torch.cat([(1 - rate) * left, rate * new_left], 1)
    wide = torch.cat([right, new_right], 0)
    q_out, r_out = torch.linalg.qr(tall)
    q_in, r_in = torch.linalg.qr(wide.T)
    u, s, v = torch.linalg.svd(r_out @ r_in.T)
    root = s.sqrt()[:rank]
    # below ``rank`` in layers that are narrower
    kept_rank = len(root)
    new = tall.new_zeros(tall.shape[0], rank), wide.new_zeros(rank, wide.shape[1])
    new[0][:, :kept_rank] = q_out @ u[:, :kept_rank] * root
    new[1][:kept_rank] = (q_in @ v[:kept_rank].T * root).T
    return new


class AverageAdapter(AnotherAdapter):
    """Second adapter that follows the exponential moving average of what the student's adapter *does*, B·A.

    It starts as the student's adapter. The average of products has a growing rank, so the adapter has twice the
    student's and keeps the best approximation. What else the student trains (biases of LoRA, whole modules, tokens) is
    averaged entry by entry.

    Raises:
        ValueError: the student's adapter is not linear in its products (DoRA), or on other layers than linear ones.
    """

    def __init__(self, model: PeftModel, name: str) -> None:
        config: Any = model.peft_config[STUDENT]
        if config.use_dora:
            raise ValueError(
                f"model.teachers.{name}: DoRA scales its products by learned magnitudes, which have no average of low "
                "rank; use LoRA, or the teacher Initial"
            )
        layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            if not isinstance(layer, LoraLinear) and type(layer).__module__.rpartition(".")[2] != "bnb":
                raise ValueError(
                    f"model.teachers.{name}: an average of adapters supports linear layers only, not "
                    f"{type(layer).__name__}"
                )
        # alpha as large as the rank everywhere, so that nothing is scaled
        ranks = {pattern: 2 * rank for pattern, rank in config.rank_pattern.items()}
        super().__init__(
            model, name, r=2 * config.r, lora_alpha=2 * config.r, rank_pattern=ranks, alpha_pattern=dict(ranks),
            lora_dropout=0.0, use_rslora=False,
        )  # fmt: skip
        self.layers = layers
        # what belongs to no product; anew at each update, since FSDP2 puts other parameters in their place
        self._has_entries = any(not _is_factor(name) for name in self.pairs())
        self.update(1.0)

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """Updates the products: average ← (1−rate)·average + rate·student."""
        reshard(self._model)
        for layer in self.layers:
            a, b = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
            scaling = layer.scaling[STUDENT]
            # in float64: in float32, QR and SVD double what factors round; the student's scaling goes into one
            left, right = average_product(
                unsharded(b).double(),
                unsharded(a).double(),
                unsharded(layer.lora_B[STUDENT].weight).double() * scaling,
                unsharded(layer.lora_A[STUDENT].weight).double(),
                rate,
                rank=a.shape[0],
            )
            slice_of(b).copy_(slice_of(sliced_like(b, left)))
            slice_of(a).copy_(slice_of(sliced_like(a, right)))
            if layer.lora_B[STUDENT].bias is not None:
                slice_of(layer.lora_B[self.name].bias).lerp_(slice_of(layer.lora_B[STUDENT].bias) * scaling, rate)
        for name, (average, student) in self.pairs().items() if self._has_entries else ():
            if not _is_factor(name):
                # not low-rank: averaged entry by entry
                slice_of(average).lerp_(slice_of(student), rate)
