"""Signals and weights of velocities. Shape legend: n steps of a chunk."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...objective import OpenSteps, Part, Signal, Steps, Weight
from .sampler import Transition
from .velocity_target import data_velocity

ADVICE = Part.advice | {"latents": "only samplers of images have velocities (DiffusionDistillation)"}


class VelocityMatching(Signal):
    """Mean of (v_student − v_teacher)² over the latent: transition matching (D-OPSD, 2605.05204), flow maps, ….

    Every `VelocityTarget` is a velocity, so that this one signal serves all.
    """

    needs = frozenset({"teacher", "latents"})
    advice = ADVICE

    def __call__(self, steps: OpenSteps) -> Tensor:
        assert isinstance(steps.student, Transition)
        return (steps.student.velocity - steps.teacher.velocity).square().flatten(1).mean(1)


class FlowMatching(Signal):
    """Mean of (v_student − (ε − x₀))² over the latent of noised data, the pretraining loss of flow models."""

    needs = frozenset({"latents"})
    advice = ADVICE

    def __call__(self, steps: OpenSteps) -> Tensor:
        assert isinstance(steps.student, Transition)
        start = steps.trajectories.observation["start"][steps.trajectory]
        v = data_velocity(start, steps.action, steps.channel("sigma"))
        return (steps.student.velocity - v).square().flatten(1).mean(1)


class NoiseLevel(Weight):
    """Weight t^power of the noise level t of a state, or (t − r)^power of the interval of a step.

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
    advice = ADVICE

    def __init__(self, power: float = 2.0, of: Literal["level", "interval"] = "level") -> None:
        if of not in ("level", "interval"):
            raise ValueError(f"NoiseLevel.of must be level or interval, got {of!r}")
        self.power, self.of = power, of

    def __call__(self, steps: Steps) -> Tensor:
        level = steps.channel("sigma")
        if self.of == "interval":
            level = level - steps.channel("toward")
        return level.clamp(min=0).pow(self.power).to(torch.float32)


class InverseError(Weight):
    """Weight 1 / (e + floor)^power of each step's own squared error e, so that no large error outweighs the others.

    MeanFlow's adaptive weight (2505.13447); there e is a sum over the latent, here `VelocityMatching`'s mean.

    Args:
        power: 0 weighs all alike. Default 1 (MeanFlow).
        floor: default 1e-3 (MeanFlow).

    Raises:
        ValueError: power is negative, or floor is not positive.
    """

    needs = frozenset({"teacher", "latents"})
    advice = ADVICE

    def __init__(self, power: float = 1.0, floor: float = 1e-3) -> None:
        if power < 0 or floor <= 0:
            raise ValueError(f"InverseError: power must be >= 0 and floor > 0, got {power} and {floor}")
        self.power, self.floor = power, floor

    def __call__(self, steps: Steps) -> Tensor:
        assert isinstance(steps, OpenSteps)
        with torch.no_grad():
            return (VelocityMatching()(steps) + self.floor) ** -self.power
