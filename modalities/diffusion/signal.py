"""Signals and weights of velocities. Shape legend: n steps of a chunk."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...objective import Signal, Steps, Weight
from .answer import data_velocity
from .sampler import Transition


class VelocityMatching(Signal):
    """mean (v_student − v_teacher)² over the latent: transition matching (D-OPSD, 2605.05204), flow maps, and the form
    in which all answers come."""

    needs = frozenset({"teacher", "latents"})

    def __call__(self, steps: Steps) -> Tensor:
        assert isinstance(steps.student, Transition)
        return (steps.student.velocity - steps.teacher.velocity).square().flatten(1).mean(1)


class FlowMatching(Signal):
    """mean (v_student − (ε − x₀))² over the latent of noised data: how flow models are pretrained. Asks no teacher."""

    needs = frozenset({"latents"})

    def __call__(self, steps: Steps) -> Tensor:
        assert isinstance(steps.student, Transition)
        start = steps.trajectories.observation["start"][steps.trajectory]
        v = data_velocity(start, steps.action, steps.channel("sigma"))
        return (steps.student.velocity - v).square().flatten(1).mean(1)


class NoiseLevel(Weight):
    """t^power of the noise level t of a state, or (t − r)^power of the interval that a step covers.

    Power 2 turns a squared error of velocities into one of clean images, x₀ = x − t·v (D-OPSD's released code, where
    time runs the other way and the weight is written (1 − t)²), or of where the steps end.

    Args:
        power: default 2.
        of: ``level`` or ``interval``.

    Raises:
        ValueError: another ``of``.
    """

    scope = "data"
    needs = frozenset({"latents"})

    def __init__(self, power: float = 2.0, of: Literal["level", "interval"] = "level") -> None:
        if of not in ("level", "interval"):
            raise ValueError(f"NoiseLevel.of must be level or interval, got {of!r}")
        self.power, self.of = power, of

    def __call__(self, steps: Steps) -> Tensor:
        level = steps.channel("sigma")
        if self.of == "interval":
            level = level - steps.channel("toward")
        return level.clamp(min=0).pow(self.power).to(torch.float32)
