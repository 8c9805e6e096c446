"""Signals that read hidden states, and no head. Shape legend: n steps of a chunk, H hidden size."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .signal import Signal
from .steps import OpenSteps


class HiddenMatch(Signal, nn.Module):
    """Squared error of hidden states (1/L)·Σ_l (1/H)·‖W_l·h_l − h′_l‖², student and teacher, over L layers.

    Where nothing else reads logits, neither head is computed, and an untied one gets no gradient: freeze it
    (``student.freeze``). It compares coordinates, so that the teacher has to be of the student's family.

    Args:
        layers: ``all`` (default: OPRD, 2606.06021), or by layer of the student that of the teacher, such as
            ``{-1: -1}`` (UniSD, 2605.06597). 0 are the embeddings, l is what layer l returns, the last one behind the
            final norm: what the head reads; negative ones count from the end.
        widths: hidden sizes of student and teacher where they differ. Each layer of the student's then has a projection
            W_l of its own, drawn when it is built and trained with the student. Default: they are equal, W_l = 1.

    Raises:
        ValueError: no layers, or projections for layers that are not named.
    """

    needs = frozenset({"teacher", "layers"})

    def __init__(self, layers: dict[int, int] | Literal["all"] = "all", widths: tuple[int, int] | None = None) -> None:
        nn.Module.__init__(self)
        if not layers:
            raise ValueError("signal.layers names none: there is nothing to compare")
        if widths is not None and layers == "all":
            raise ValueError(f"signal.widths={widths}: each layer has a projection of its own, so name them in layers")
        self.layers, self.widths = layers, widths
        self.projections = nn.ModuleDict()
        if widths is not None and layers != "all":
            self.projections.update({_key(own): nn.Linear(*widths, False) for own in layers})

    def __call__(self, steps: OpenSteps) -> Tensor:
        student, teacher = steps.student.layers, steps.teacher.layers  # type: ignore[union-attr]
        pairs = {number: number for number in student if number > 0} if self.layers == "all" else self.layers
        errors = [self._projected(own, student[own]) - teacher[other] for own, other in pairs.items()]
        return torch.stack([error.square().mean(-1) for error in errors]).mean(0)

    def _projected(self, number: int, hidden: Tensor) -> Tensor:
        if self.widths is None:
            return hidden
        projection: Any = self.projections[_key(number)]
        projected: Tensor = projection(hidden.to(projection.weight.dtype))
        return projected


def _key(number: int) -> str:
    return f"layer_{number}".replace("-", "minus_")
