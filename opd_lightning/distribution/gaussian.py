"""Gaussian: independent normals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Distribution, GradientAccumulator


@dataclass
class Gaussian(Distribution):
    """Independent normals: ``mean [B, T, ...]`` or ``[N, ...]``, ``scale`` broadcastable to it (a scalar is fine)."""

    mean: Tensor
    scale: Tensor

    @property
    def states(self) -> tuple[int, ...]:
        return tuple(self.mean.shape[:2])

    def at(self, index: Tensor) -> Gaussian:
        if self.scale.dim() == 0:
            return Gaussian(self.mean.flatten(0, 1)[index], self.scale)
        return Gaussian(self.mean.flatten(0, 1)[index], self.scale.expand_as(self.mean).flatten(0, 1)[index])

    def to(self, device: torch.device | str) -> Gaussian:
        return Gaussian(self.mean.to(device), self.scale.to(device))

    def bytes_per_state(self) -> int:
        return 4 * self.mean[0].numel() * self.mean.element_size()

    def accumulator(self) -> GradientAccumulator:
        return _GaussianGradient(self)

    def chunk(self, states: slice) -> Gaussian:
        return Gaussian(
            self.mean[states].detach(), (self.scale if self.scale.dim() == 0 else self.scale[states]).detach()
        )

    def log_prob(self, action: Tensor) -> Tensor:
        """Returns the log-density ``[n]`` of ``action [n, ...]``, summed over the event."""
        return torch.distributions.Normal(self.mean, self.scale).log_prob(action).flatten(1).sum(1)

    def entropy(self) -> Tensor:
        """Returns the differential entropy ``[n]`` in nats, summed over the event, no gradient; may be negative."""
        per_dimension = self.scale.detach().log() + 0.5 * math.log(2 * math.pi * math.e)
        return per_dimension.expand_as(self.mean).flatten(1).sum(1)


def gaussian_kl(a: Gaussian, b: Gaussian) -> Tensor:
    """Returns KL(a‖b) ``[n]`` of independent normals, summed over the event."""
    ratio = a.scale / b.scale
    terms = 0.5 * (ratio.square() + ((a.mean - b.mean) / b.scale).square() - 1) - ratio.log()
    return terms.flatten(1).sum(1)


class _GaussianGradient(GradientAccumulator):
    def __init__(self, student: Gaussian) -> None:
        self._student = student
        learned_scale = student.scale.requires_grad
        self.inputs = [student.mean, student.scale] if learned_scale else [student.mean]
        self.sums = [torch.zeros_like(tensor) for tensor in self.inputs]

    def open(self, states: slice) -> Gaussian:
        self._states, self._open = states, self._student.chunk(states)
        self._leaves = [self._open.mean, self._open.scale][: len(self.inputs)]
        for leaf in self._leaves:
            leaf.requires_grad_()
        return self._open

    def close(self, loss: Tensor) -> None:
        for total, gradient in zip(self.sums, torch.autograd.grad(loss, self._leaves), strict=True):
            if total.dim() == 0:  # one scale for all states: every chunk contributes
                total.add_(gradient)
            else:
                total[self._states] = gradient
