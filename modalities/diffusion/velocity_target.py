"""Velocity targets: functions of a teacher for a student's step from noise level t towards r.

All of their values are velocities, so that one squared error serves every method. Shape legend: n states ``[n, ...]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ...finite import Finite
from . import flow
from .query import RestrictedField, VisitedStates
from .sampler import generator


class VelocityTarget(Finite, ABC):
    """Target velocity of a teacher.

    Args:
        guidance: w in v_uncond + w·(v_cond − v_uncond); 1, the default, needs one forward pass. Other conventions
            are converted by `flow.guidance_scale`.

    Raises:
        ValueError: guidance is negative.
    """

    jumps = False
    """True where the end of a step is an input of the teacher, also when it acts."""
    asks: tuple[str, ...] = ()
    """Other entries of ``model.teachers`` that it needs."""
    of_data = False
    """True where it is defined at states of noised data only (``rollout.behavior: {dataset: …}``)."""
    guidance: float = 1.0  # also of a subclass whose own __init__ doesn't call this one

    def __init__(self, guidance: float = 1.0) -> None:
        if guidance < 0:
            raise ValueError(f"{type(self).__name__}.guidance must be >= 0, got {guidance}")
        self.guidance = guidance

    @abstractmethod
    def __call__(self, field: RestrictedField, states: VisitedStates) -> Tensor:
        """Computes target velocities ``[n, ...]``; ``field`` is the teacher's own, with guidance."""


class StepVelocity(VelocityTarget):
    """Velocity of the teacher for the same step: transition matching, D-OPSD.

    For teachers and students that take few steps already. Of models without the end of a step as input it is the
    velocity at the state.
    """

    jumps = True

    def __call__(self, field: RestrictedField, states: VisitedStates) -> Tensor:
        return field(states.latent, states.t, states.r)


class Velocity(VelocityTarget):
    """Velocity of the teacher at the state, that of a step of no length."""

    def __call__(self, field: RestrictedField, states: VisitedStates) -> Tensor:
        return field(states.latent, states.t, states.t)


class AverageVelocity(VelocityTarget):
    """Average velocity of the teacher from t to r: on-policy flow-map distillation.

    The interval is integrated in Euler steps from the state that the student visited.

    Args:
        substeps: equal ones. Default 8: 4 steps of the student are then 32 of the teacher.
        stride: short intervals get fewer of them, as many as make each at most this long; None: all get ``substeps``.
        guidance: as in `VelocityTarget`.

    Raises:
        ValueError: substeps < 1, or a stride that is not positive.
    """

    def __init__(self, substeps: int = 8, stride: float | None = None, guidance: float = 1.0) -> None:
        super().__init__(guidance)
        if substeps < 1:
            raise ValueError(f"AverageVelocity.substeps must be >= 1, got {substeps}")
        if stride is not None and stride <= 0:
            raise ValueError(f"AverageVelocity.stride must be > 0, got {stride}")
        self.substeps, self.stride = substeps, stride

    def __call__(self, field: RestrictedField, states: VisitedStates) -> Tensor:
        length = states.t - states.r
        count = torch.full_like(length, self.substeps)
        if self.stride is not None:
            # less than a rounding error longer than the stride is not longer
            count = (length / self.stride - 1e-6).ceil().clamp(1, self.substeps)
        latent, total = states.latent.clone(), torch.zeros_like(states.latent)
        for k in range(int(count.max())):
            on = (count > k).nonzero().squeeze(-1)
            t, after = (states.t[on] - length[on] * (substep / count[on]) for substep in (k, k + 1))
            v = field.at(on)(latent[on], t, t)
            total[on] += v
            latent[on] = flow.euler(latent[on], v, t, after)
        return total / flow.over(count, total)


class TotalDerivative(VelocityTarget):
    """Right-hand side v − (t − r)·du/dt of the identity of flow maps, with v = ε − x₀ of the data.

    AnyFlow's forward stage (2605.13724), MeanFlow's identity (2505.13447). For a teacher with `Live`
    weights, or an average of them.

    du/dt is a central difference along v with r fixed. AnyFlow also rescales the loss of the states with r < t to the
    mean of the others; that is not done here. Guidance w is folded in as AnyFlow does: the student's velocity is to be
    w times the right-hand side plus (1 − w) times the unconditional velocity (of which no gradient is taken here).

    Args:
        epsilon: half the width of the difference. Default 5/1000 (AnyFlow).
        guidance: w. Default 1; AnyFlow uses 3.
    """

    of_data = True

    def __init__(self, epsilon: float = 0.005, guidance: float = 1.0) -> None:
        super().__init__(guidance)
        self.epsilon = epsilon

    def __call__(self, field: RestrictedField, states: VisitedStates) -> Tensor:
        x, t, r = states.latent, states.t, states.r
        v = data_velocity(x, states.clean, t)
        # one-sided at both ends, where the difference would leave [0, 1]
        later, sooner = (t + self.epsilon).clamp(max=1), (t - self.epsilon).clamp(min=0)
        ahead = states.other("self")(flow.euler(x, v, t, later), later, r.clamp(max=1))
        # a step must not end above its start
        behind = states.other("self")(flow.euler(x, v, t, sooner), sooner, torch.minimum(r, sooner))
        change = (ahead - behind) / flow.over(later - sooner, x)
        target = v - flow.over(t - r, x) * change.to(x.dtype)
        if self.guidance == 1:
            return target
        here = states.other("self")(x, t, r)
        # `flow.guided` solved for it, which saves a forward pass
        unconditional = (field(x, t, r) - self.guidance * here) / (1 - self.guidance)
        return self.guidance * target + (1 - self.guidance) * unconditional


class ScoreDifference(VelocityTarget):
    """Target by the difference of two scores, which moves the student's samples towards the teacher's distribution.

    DMD2 (2405.14867), Self-Forcing (2506.08009), AnyFlow's second stage (2605.13724).

    g is the student's clean prediction at the state. Noised afresh to a level s, the teacher and a model of the
    student's own samples (``fake``, a `LearnedScore`) denoise it; d = x₀(fake) − x₀(teacher), divided by the mean of
    |g − x₀(teacher)|. With the weight `NoiseLevel` of power 2 and a coefficient of ½, the squared error is DMD2's
    ½·mean (g − sg[g − d])², whose gradient is d divided by the number of pixels.

    Args:
        fake: an entry of ``model.teachers`` whose weights are a `LearnedScore`.
        low, high: s is uniform between them. Default 0.02 and 0.98 (DMD2).
        guidance: of the teacher.

    Raises:
        ValueError: low and high are no part of [0, 1].
    """

    def __init__(self, fake: str = "fake", low: float = 0.02, high: float = 0.98, guidance: float = 1.0) -> None:
        super().__init__(guidance)
        if not 0 <= low < high <= 1:
            raise ValueError(f"ScoreDifference: need 0 <= low < high <= 1, got low={low} and high={high}")
        self.fake, self.low, self.high, self.asks = fake, low, high, (fake,)

    def __call__(self, field: RestrictedField, states: VisitedStates) -> Tensor:
        x, t = states.latent, states.t
        v = states.other("student")(x, t, states.r)
        g = flow.clean_estimate(x, v, t).to(x.dtype)
        s, noise = drawn(states.seeds, g, self.low, self.high)
        noisy = flow.noised(g, noise, s).to(x.dtype)
        real = flow.clean_estimate(noisy, field(noisy, s, s), s)
        fake = flow.clean_estimate(noisy, states.other(self.fake)(noisy, s, s), s)
        size = (g - real).abs().flatten(1).mean(1).clamp(min=1e-6)
        direction = (fake - real) / flow.over(size, g)
        # x₀ = x − t·v: the clean image g − d has the velocity v + d / t
        return v + (direction / flow.over(t, g)).to(v.dtype)


def data_velocity(latent: Tensor, clean: Tensor, t: Tensor) -> Tensor:
    """Returns ε − x₀ of latents that are ``clean`` = x₀ with noise."""
    return ((latent - clean) / flow.over(t, latent)).to(latent.dtype)


def drawn(seeds: list[int], like: Tensor, low: float, high: float, again: int = 0) -> tuple[Tensor, Tensor]:
    """Draws noise levels ``[n]`` and noise ``[n, ...]``, anew for each seed and each number of ``again``."""
    levels, noises = [], []
    for seed in seeds:
        draw = generator(seed, 3 + again)
        levels.append(low + (high - low) * torch.rand((), generator=draw))
        noises.append(torch.randn(like.shape[1:], generator=draw))
    return torch.stack(levels).to(like.device), torch.stack(noises).to(like)
