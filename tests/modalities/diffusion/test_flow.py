"""The convention of flow matching against diffusers and float64, and what follows from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_lightning.modalities.diffusion import flow

levels = st.floats(0.01, 0.99)


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


@given(level=levels, other=levels)
@settings(max_examples=30)
def test_the_straight_path_is_traveled_exactly(level, other):
    clean, noise = pair()
    latent, v = flow.noised(clean, noise, level), flow.velocity(clean, noise)
    torch.testing.assert_close(flow.euler(latent, v, level, other), flow.noised(clean, noise, other))
    torch.testing.assert_close(flow.clean_estimate(latent, v, level), clean)
    torch.testing.assert_close(flow.noise_estimate(latent, v, level), noise)
    torch.testing.assert_close(flow.renoised(latent, v, level, other, noise), flow.noised(clean, noise, other))


def test_levels_may_differ_by_row():
    clean, noise = pair()
    sigma = torch.tensor([0.2, 0.7], dtype=torch.float64)
    both = flow.noised(clean, noise, sigma)
    for i in range(2):
        assert torch.equal(both[i], (1 - sigma[i]) * clean[i] + sigma[i] * noise[i])


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_it_is_diffusers_convention(shift, steps):
    """Its noising, and its steps along a velocity that depends on the state, bit for bit in float32."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    clean, noise = (x.float() for x in pair())
    at = scheduler.timesteps[-1:]
    torch.testing.assert_close(scheduler.scale_noise(clean, at, noise), flow.noised(clean, noise, scheduler.sigmas[-2]))
    theirs = ours = noise
    for k, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(torch.tanh(theirs), timestep, theirs, return_dict=False)[0]
        ours = flow.euler(ours, torch.tanh(ours), scheduler.sigmas[k], scheduler.sigmas[k + 1])
    assert torch.equal(ours, theirs)


@given(scale=st.floats(0, 10))
@settings(max_examples=20)
def test_guidance_in_every_convention(scale):
    cond, uncond = pair()
    found = {
        "uncond + w·(cond − uncond)": uncond + scale * (cond - uncond),
        "cond + w·(cond − uncond)": cond + scale * (cond - uncond),
        "cond + (w − 1)·(cond − uncond)": cond + (scale - 1) * (cond - uncond),
    }
    for convention, wanted in found.items():
        torch.testing.assert_close(flow.guided(cond, uncond, flow.guidance_scale(scale, convention)), wanted)
    torch.testing.assert_close(flow.guided(cond, uncond, 1.0), cond)
    with pytest.raises(ValueError, match="guidance: no convention 'other'; there are"):
        flow.guidance_scale(scale, "other")  # type: ignore[arg-type]


@given(t=st.floats(0.1, 0.95), share=st.floats(0.1, 0.9), a=st.floats(0.1, 1.5))
@settings(max_examples=30)
def test_the_stochastic_step_is_flow_grpos(t, share, a):
    clean, noise = pair()
    r = t * share
    latent, v = flow.noised(clean, noise, t), torch.sin(clean)
    mean, std = flow.stochastic_step(latent, v, t, r, a)
    s, dt = a * np.sqrt(t / (1 - t)), r - t
    wanted = latent.numpy() * (1 + s**2 / (2 * t) * dt) + v.numpy() * (1 + s**2 * (1 - t) / (2 * t)) * dt
    np.testing.assert_allclose(mean.numpy(), wanted, rtol=1e-10)
    np.testing.assert_allclose(std.numpy(), np.full((2, 1, 1, 1), s * np.sqrt(-dt)), rtol=1e-10)


def test_without_noise_it_is_eulers_step_and_at_pure_noise_it_is_finite():
    clean, noise = pair()
    v = flow.velocity(clean, noise)
    mean, std = flow.stochastic_step(noise, v, 1.0, 0.75, 0.0)
    torch.testing.assert_close(mean, flow.euler(noise, v, 1.0, 0.75))
    assert (std == 0).all()
    mean, std = flow.stochastic_step(noise, v, 1.0, 0.75, 0.8)
    assert torch.isfinite(mean).all()
    np.testing.assert_allclose(std.flatten().numpy(), 0.8 * np.sqrt(1 / 0.25) * np.sqrt(0.25))


def test_the_stochastic_step_keeps_the_marginals():
    """Of normal data, whose velocity is known: many small steps end at the data's mean and standard deviation."""
    m, sd, count, steps = 1.5, 0.5, 20000, 400
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(1, 0.0, steps + 1, dtype=torch.float64)
    x = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    for t, r in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        variance = ((1 - t) * sd) ** 2 + t**2
        clean = m + (1 - t) * sd**2 / variance * (x - (1 - t) * m)
        v = (x - clean) / t
        mean, std = flow.stochastic_step(x, v, t, r, 0.7)
        x = mean + std * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    assert abs(float(x.mean()) - m) < 0.03
    assert abs(float(x.std()) - sd) < 0.03
