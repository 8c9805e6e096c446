"""The convention of flow matching that everything here follows, as diffusers has it, and the steps of its samplers.

    x_σ = (1 − σ)·x₀ + σ·ε        σ = 1 is noise, σ = 0 is data
    v   = ε − x₀                   what a model predicts
    x_r = x_t + (r − t)·v          Euler's step from noise level t to r

Shape legend: latents and velocities ``[B, ...]``; noise levels ``[B]`` or a scalar, in [0, 1].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Convention = Literal["uncond + w·(cond − uncond)", "cond + w·(cond − uncond)", "cond + (w − 1)·(cond − uncond)"]


def over(level: Tensor | float, like: Tensor) -> Tensor:
    """Reshapes a noise level ``[B]`` to multiply ``like [B, ...]``; higher precision stays."""
    if not isinstance(level, Tensor):
        return torch.tensor(level, dtype=like.dtype, device=like.device)
    level = level.to(like.device, torch.promote_types(level.dtype, like.dtype))
    return level.reshape(-1, *[1] * (like.dim() - 1)) if level.dim() else level


def noised(clean: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Mixes data and noise: x_σ = (1 − σ)·x₀ + σ·ε."""
    sigma = over(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """Returns v = ε − x₀."""
    return noise - clean


def clean_estimate(latent: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """Returns x₀ = x_σ − σ·v; a difference of two of them is σ times that of the velocities."""
    return latent - over(sigma, latent) * v


def noise_estimate(latent: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """Returns ε = x_σ + (1 − σ)·v."""
    return latent + (1 - over(sigma, latent)) * v


def euler(latent: Tensor, v: Tensor, t: Tensor | float, r: Tensor | float) -> Tensor:
    """Steps from x_t to x_r, in the precision of the levels: diffusers' flow-map scheduler has float64."""
    return (latent + (over(r, latent) - over(t, latent)) * v).to(latent.dtype)


def renoised(latent: Tensor, v: Tensor, t: Tensor | float, r: Tensor | float, noise: Tensor) -> Tensor:
    """Adds fresh noise of level r to the clean estimate at t: a step of consistency models and of DMD2 (2405.14867)."""
    return noised(clean_estimate(latent, v, t), noise, r)


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Returns v_uncond + w·(v_cond − v_uncond), the only formula of guidance here; w = 1: the conditional model."""
    return unconditional + scale * (conditional - unconditional)


def guidance_scale(value: float, convention: Convention) -> float:
    """Converts a strength that was published under another convention to w of `guided`.

    ``cond + w·(cond − uncond)`` is written by DMD2-derived video code, Self-Forcing and LCM, ``cond + (w − 1)·(…)`` by
    FastGen.

    Raises:
        ValueError: no such convention.
    """
    shift = {"uncond + w·(cond − uncond)": 0.0, "cond + w·(cond − uncond)": 1.0, "cond + (w − 1)·(cond − uncond)": 0.0}
    if convention not in shift:
        raise ValueError(f"guidance: no convention {convention!r}; there are {', '.join(map(repr, shift))}")
    return value + shift[convention]


def stochastic_step(
    latent: Tensor, v: Tensor, t: Tensor | float, r: Tensor | float, noise_level: float
) -> tuple[Tensor, Tensor]:
    """Computes mean ``[B, ...]`` and deviation ``[B, 1, ...]`` of x_r, of the SDE with the ODE's marginals.

    With s = a·√(t / (1 − t)) and Δ = r − t < 0, the mean is x·(1 + s²·Δ / 2t) + v·(1 + s²·(1 − t) / 2t)·Δ and the
    standard deviation s·√−Δ (Flow-GRPO, 2505.05470). At t = 1, where s is infinite, 1 − r stands in for 1 − t, as in
    Flow-GRPO's code.

    Args:
        noise_level: a; 0 is Euler's step. Default in Flow-GRPO 0.7; verl-omni uses 0.8.
    """
    level, to = over(t, latent), over(r, latent)
    away = torch.where(level >= 1, 1 - to, 1 - level)
    s, step = noise_level * (level / away).sqrt(), to - level
    mean = latent * (1 + s**2 * step / (2 * level)) + v * (1 + s**2 * (1 - level) / (2 * level)) * step
    return mean, (s * (-step).sqrt()).expand(latent.shape[0], *[1] * (latent.dim() - 1))
