"""Samplers: the states that a few-step student visits, and those of them that are trained.

Shape legend: B trajectories, T steps (padded), latents ``[B, ...]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...distribution import Gaussian
from ...finite import Finite
from ...rollout_settings import derived_seed
from . import flow
from .query import VelocityField


@dataclass
class Plan:
    """Steps of one trajectory.

    Attributes:
        sigma: ``[T + 1]`` the noise level of every state, the last one too.
        toward: ``[T]`` the level of the step's end as an input of the model; the next level may be another.
        trained: ``[T]`` bool.
    """

    sigma: Tensor
    toward: Tensor
    trained: Tensor


@dataclass
class Transition(Gaussian):
    """Distribution of the next latents, and the velocity of the step."""

    velocity: Tensor


class Sampler(Finite, ABC):
    """Sampler, by which the student gets from noise to an image."""

    stochastic = False
    """True where its transitions have a density."""
    chained = False
    """True where the gradient also flows through the steps before a trained one."""

    @abstractmethod
    def plan(self, levels: Callable[[int], Tensor], horizon: int, draw: torch.Generator) -> Plan:
        """Plans the steps of one trajectory.

        Args:
            levels: ``[K + 1]`` the schedule of K steps, from 1 to 0.
            horizon: ``rollout.horizon``.
            draw: for random plans.
        """

    def step(self, latent: Tensor, v: Tensor, t: Tensor, r: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """Computes the next latents ``[n, ...]``."""
        return flow.euler(latent, v, t, r)

    def transition(self, latent: Tensor, v: Tensor, t: Tensor, r: Tensor) -> Transition:
        """Returns the distribution of the next latents; without a density, where the sampler has none."""
        return Transition(flow.euler(latent, v, t, r), latent.new_zeros(()), v)

    def evaluated(self) -> Sampler:
        """Returns the sampler by which a student that was trained on its states is evaluated."""
        return Euler()


def _whole(sigma: Tensor, toward: Tensor | None = None) -> Plan:
    return Plan(sigma, sigma[1:] if toward is None else toward, torch.ones(len(sigma) - 1, dtype=torch.bool))


class Euler(Sampler):
    """Few-step ODE: x_r = x_t + (r − t)·v at every level of the schedule; all states are trained.

    Args:
        steps: draws the number of steps of each trajectory from these, for students that jump over any interval.
            Default: ``rollout.horizon`` for all.

    Raises:
        ValueError: a number of steps below 1.
    """

    def __init__(self, steps: list[int] | None = None) -> None:
        self.steps = _checked(steps)

    def plan(self, levels: Callable[[int], Tensor], horizon: int, draw: torch.Generator) -> Plan:
        return _whole(levels(horizon if self.steps is None else _one_of(self.steps, draw)))


class SDE(Sampler):
    """SDE with the ODE's marginals (Flow-GRPO, 2505.05470): transitions are Gaussian, so KLs between them exist.

    The step that ends at noise level 0 is Euler's, and is not trained: it has no density.

    Args:
        noise_level: a in s = a·√(t / (1 − t)). Default 0.7 (Flow-GRPO; verl-omni uses 0.8).

    Raises:
        ValueError: noise_level is not positive.
    """

    stochastic = True

    def __init__(self, noise_level: float = 0.7) -> None:
        if noise_level <= 0:
            raise ValueError(f"SDE.noise_level must be > 0 (Euler is the sampler without noise), got {noise_level}")
        self.noise_level = noise_level

    def plan(self, levels: Callable[[int], Tensor], horizon: int, draw: torch.Generator) -> Plan:
        if horizon < 2:
            raise ValueError(f"rollout.horizon={horizon}: the last step of an SDE is not trained; it needs 2 or more")
        plan = _whole(levels(horizon))
        plan.trained = plan.sigma[1:] > 0
        return plan

    def step(self, latent: Tensor, v: Tensor, t: Tensor, r: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        next_one = self.transition(latent, v, t, r)
        noisy = next_one.mean + next_one.scale * noise()
        return torch.where(flow.over(r, latent) > 0, noisy, flow.euler(latent, v, t, r))

    def transition(self, latent: Tensor, v: Tensor, t: Tensor, r: Tensor) -> Transition:
        mean, deviation = flow.stochastic_step(latent, v, t, r, self.noise_level)
        return Transition(mean.to(latent.dtype), deviation.to(latent.dtype), v)


class Renoise(Sampler):
    """Sampler that predicts the clean image and adds fresh noise of the next level (consistency models, DMD2's chain).

    Steps of the model go all the way, from t to 0 (2405.14867).

    Args:
        random_exit: the rollout ends with the clean prediction of a step drawn uniformly, the only one that is
            trained (backward simulation, DMD2 and Self-Forcing, 2506.08009). They draw one exit for all trajectories;
            here each has its own. Off: all steps, all trained.
    """

    def __init__(self, random_exit: bool = True) -> None:
        self.random_exit = random_exit

    def plan(self, levels: Callable[[int], Tensor], horizon: int, draw: torch.Generator) -> Plan:
        sigma = levels(horizon)
        if self.random_exit:
            steps = 1 + int(torch.randint(horizon, (), generator=draw))
            sigma = torch.cat([sigma[:steps], sigma.new_zeros(1)])
        plan = _whole(sigma, torch.zeros(len(sigma) - 1, dtype=sigma.dtype))
        if self.random_exit:
            plan.trained[:-1] = False
        return plan

    def step(self, latent: Tensor, v: Tensor, t: Tensor, r: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        clean = flow.clean_estimate(latent, v, t)
        return torch.where(flow.over(r, latent) > 0, flow.noised(clean, noise(), r), clean).to(latent.dtype)

    def evaluated(self) -> Sampler:
        return Renoise(random_exit=False)


class Shortcuts(Sampler):
    """Step of an N-step rollout in at most three jumps: 1 → t_i, t_i → t_{i+1}, t_{i+1} → 0.

    AnyFlow's flow-map backward simulation (2605.13724). It costs three forward passes, however large N is.

    Args:
        steps: N is drawn from these, and i uniformly. Default 2, 4, 8, 16, 50 (AnyFlow).
        trained: ``all`` jumps, only the ``middle`` one, or only the ``last``, whose end is the clean image.
        chained: the gradient also flows through the jumps that came before, as in AnyFlow's second stage. That keeps
            the activations of three forward passes instead of one. Default off.

    Raises:
        ValueError: a number of steps below 1, or another ``trained``.
    """

    def __init__(self, steps: list[int] | None = None, trained: str = "all", chained: bool = False) -> None:
        if trained not in ("all", "middle", "last"):
            raise ValueError(f"Shortcuts.trained must be all, middle or last, got {trained!r}")
        self.steps, self.trained, self.chained = _checked(steps) or [2, 4, 8, 16, 50], trained, chained

    def plan(self, levels: Callable[[int], Tensor], horizon: int, draw: torch.Generator) -> Plan:
        schedule = levels(_one_of(self.steps, draw))
        i = int(torch.randint(len(schedule) - 1, (), generator=draw))
        # the first and the last step share a stop with the jumps beside them, of which there are then fewer
        stops = schedule[[0, i, i + 1, -1]].unique_consecutive()
        plan = _whole(stops)
        if self.trained == "middle":
            plan.trained = stops[:-1] == schedule[i]
        elif self.trained == "last":
            plan.trained = stops[1:] == 0
        return plan


def plan_all(
    sampler: Sampler, levels: Callable[[int], Tensor], horizon: int, seeds: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Plans B trajectories: noise levels ``[B, T + 1]``, ends of steps ``[B, T]`` and trained ones ``[B, T]`` bool.

    A trajectory that is over stays at level 0.

    Raises:
        ValueError: a schedule without steps, or one that does not fall from 1 to 0.
    """
    schedules: dict[int, Tensor] = {}

    def schedule(steps: int) -> Tensor:
        if steps not in schedules:
            schedules[steps] = _valid(levels(steps), steps)
        return schedules[steps]

    plans = [sampler.plan(schedule, horizon, generator(seed, 1)) for seed in seeds]
    width = max(len(plan.trained) for plan in plans)
    sigma = torch.zeros(len(plans), width + 1, dtype=plans[0].sigma.dtype)
    toward, trained = torch.zeros_like(sigma[:, 1:]), torch.zeros(len(plans), width, dtype=torch.bool)
    for row, plan in enumerate(plans):
        steps = len(plan.trained)
        sigma[row, : steps + 1], toward[row, :steps], trained[row, :steps] = plan.sigma, plan.toward, plan.trained
    return sigma, toward, trained


def roll_out(
    sampler: Sampler, field: VelocityField, start: Tensor, sigma: Tensor, toward: Tensor, seeds: Sequence[int]
) -> Tensor:
    """Samples the latents after each step, ``[B, T, ...]``, from ``start [B, ...]``; 0 after a trajectory's end."""
    latent = start
    after = []
    draws = [generator(seed, 2) for seed in seeds]
    for k in range(toward.shape[1]):
        rows = (sigma[:, k] > 0).nonzero().squeeze(-1)
        here = latent[rows]

        def noise(rows: Tensor = rows) -> Tensor:
            drawn = [torch.randn(start.shape[1:], generator=draws[row]) for row in rows.tolist()]
            return torch.stack(drawn).to(start.device, start.dtype)

        v = field(rows, here, sigma[rows, k], toward[rows, k])
        latent = torch.zeros_like(start)
        latent[rows] = sampler.step(here, v, sigma[rows, k], sigma[rows, k + 1], noise)
        after.append(latent)
    return torch.stack(after, 1)


def generator(seed: int, purpose: int | None = None) -> torch.Generator:
    """Creates the generator of a trajectory's starting noise, or of another purpose.

    That of the starting noise is a pipeline's ``torch.Generator().manual_seed(seed)``.
    """
    # purposes: 1 plans and levels of noised images, 2 noise of steps, from 3 on targets and learned scores
    return torch.Generator().manual_seed(seed if purpose is None else derived_seed(seed, purpose))


def _valid(sigma: Tensor, steps: int) -> Tensor:
    if len(sigma) != steps + 1 or steps < 1 or not bool((sigma.diff() < 0).all()) or sigma[-1] != 0:
        raise ValueError(
            f"the schedule of {steps} steps is {[round(float(level), 4) for level in sigma]}; it must fall at every "
            "step and end at 0 (set model.shift, or another number of steps)"
        )
    return sigma


def _checked(steps: list[int] | None) -> list[int] | None:
    if steps is not None and (not steps or min(steps) < 1):
        raise ValueError(f"sampler.steps must be numbers of steps >= 1, got {steps}")
    return steps


def _one_of(steps: list[int], draw: torch.Generator) -> int:
    return steps[int(torch.randint(len(steps), (), generator=draw))]


@dataclass
class Noising:
    """Distribution of noise levels t, and of ends r of intervals, for images of the dataset.

    Args:
        same: the share with r = t, which is plain flow matching. Default 1; AnyFlow (2605.13724) uses 0.5.
        whole: the share with r = 0. Default 0; AnyFlow uses 0.25. For the rest t and r are two uniform draws.
        shift: of both levels, s·t / (1 + (s−1)·t). Default 1; AnyFlow uses 5.

    Raises:
        ValueError: shares that are negative or exceed 1 together, or a shift that is not positive.
    """

    same: float = 1.0
    whole: float = 0.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if min(self.same, self.whole) < 0 or self.same + self.whole > 1 or self.shift <= 0:
            raise ValueError(f"noising: shares must be >= 0 and at most 1 together, and shift > 0, got {self}")

    def draw(self, draw: torch.Generator) -> tuple[float, float]:
        """Draws t and r of one image."""
        kind, a, b = torch.rand(3, generator=draw, dtype=torch.float64).tolist()
        t, r = max(a, b), min(a, b)
        if kind < self.same:
            t = r = a
        elif kind < self.same + self.whole:
            t, r = a, 0.0
        shifted = [self.shift * level / (1 + (self.shift - 1) * level) for level in (t, r)]
        # not 0, which `data_velocity` would divide by
        return max(shifted[0], 1e-3), shifted[1] if shifted[1] < shifted[0] else max(shifted[0], 1e-3)
