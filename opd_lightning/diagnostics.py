"""What is logged at each step: weighted averages that add up over chunks, micro-batches and ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .distribution import CategoricalChunk, Gaussian, gaussian_kl

if TYPE_CHECKING:
    from lightning import Trainer

    from .objective.steps import Steps
    from .objective.weight import Weight

OVERLAP_K = 16


class Averages:
    """Sums and counts by name, kept on the device: nothing waits for the GPU until `compute`."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor | float, counts: Tensor | float | None = None) -> None:
        """Adds ``values`` (any shape); ``counts`` says how much each weighs in the mean (default: 1)."""
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device)
        number = torch.ones_like(total) if counts is None else torch.as_tensor(counts, device=self.device)
        pair = torch.stack([total.sum(), number.sum().double()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def add_clipped(self, term: str, weight: Weight, values: Tensor, on: Tensor) -> None:
        """The share of a term's steps that one of its weights sets to 0."""
        self.add(f"clipped/{term}/{type(weight).__name__}", (values == 0) & on, on.float())

    def merge(self, other: Averages) -> None:
        for name, pair in other.sums.items():
            pair = pair.to(self.device)
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def compute(self) -> dict[str, float]:
        """Means, with one transfer from the device."""
        if not self.sums:
            return {}
        table = torch.stack(list(self.sums.values())).tolist()
        return {name: s / c for name, (s, c) in zip(self.sums, table, strict=True) if c > 0}

    def over_ranks(self, trainer: Trainer) -> Averages:
        """Those of all ranks together; every rank must call it."""
        if trainer.world_size == 1:
            return self
        everyone: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(everyone, self.state_dict())
        total = Averages()
        for sums in everyone:
            total.merge(Averages.from_state_dict(sums))
        return total

    def state_dict(self) -> dict[str, Tensor]:
        return {name: pair.cpu() for name, pair in self.sums.items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], device: torch.device | str = "cpu") -> Averages:
        made = cls(device)
        made.sums = {name: pair.to(device) for name, pair in state.items()}
        return made


def forget_logged(trainer: Trainer) -> None:
    """What was logged of a step is not logged of later ones, as Lightning would until the epoch ends."""
    for result in (trainer._results or {}).values():
        if not result.meta.on_epoch:
            result.reset()


@torch.no_grad()
def chunk_diagnostics(chunk: Steps, averages: Averages) -> None:
    """Of the open chunk, at temperature 1: entropies, both KLs, first-step KL, top-k overlap, privileged gap.

    The gap is the mean of log q(y | view) − log q(y) over the sampled steps, under the teacher's own weights. Of
    Gaussians the first three alone (`_of_gaussians`).
    """
    student = chunk.student
    if isinstance(student, Gaussian):
        _of_gaussians(chunk, student, averages)
        return
    assert student is not None
    averages.add("student_entropy", student.entropy())
    log_p, p = student.known()
    for name, teacher in chunk.streams.items():
        assert isinstance(teacher, CategoricalChunk)
        here = _where(chunk, name)
        log_q, q = teacher.known()
        if name in chunk.without_view:
            blind = chunk.without_view[name].log_prob(chunk.action)
            averages.add(f"{name}/privileged_gap", (teacher.log_prob(chunk.action) - blind) * here, here)
        log_ratio = log_p - log_q
        reverse, forward = (p * log_ratio).sum(-1), -log_ratio.mul_(q).sum(-1)
        averages.add(f"{name}/kl_student_teacher", reverse * here, here)
        averages.add(f"{name}/kl_teacher_student", forward * here, here)
        averages.add(f"{name}/entropy", teacher.entropy() * here, here)
        first = here * (chunk.position == 0)
        averages.add(f"{name}/kl_first_step", reverse * first, first)
        k = min(OVERLAP_K, log_p.shape[-1])
        mine, theirs = log_p.topk(k).indices, log_q.topk(k).indices
        shared = (mine[:, :, None] == theirs[:, None, :]).any(-1)
        averages.add(f"{name}/overlap_top{k}", shared.float().mean(-1) * here, here)
        averages.add(f"{name}/overlap_mass", (p.gather(-1, mine) * shared).sum(-1) * here, here)


def _of_gaussians(chunk: Steps, student: Gaussian, averages: Averages) -> None:
    """Exact, in nats **per dimension** of the event, so that latents of any size compare; densities may have a negative
    entropy. Steps without a density (of a sampler without noise) count in no mean."""
    dimensions = student.mean[0].numel()
    noisy = (student.scale > 0).expand_as(student.mean).flatten(1).all(1)

    def add(name: str, values: Tensor, here: Tensor) -> None:
        averages.add(name, (values / dimensions).masked_fill(here == 0, 0.0), here)

    add("student_entropy", student.entropy(), noisy.float())
    for name, teacher in chunk.streams.items():
        assert isinstance(teacher, Gaussian)
        here = _where(chunk, name) * noisy
        add(f"{name}/kl_student_teacher", gaussian_kl(student, teacher), here)
        add(f"{name}/kl_teacher_student", gaussian_kl(teacher, student), here)
        add(f"{name}/entropy", teacher.entropy(), here)
        add(f"{name}/kl_first_step", gaussian_kl(student, teacher), here * (chunk.position == 0))


def _where(chunk: Steps, teacher: str) -> Tensor:
    """``[n]`` 1 at the steps of trajectories of which this teacher has something to say, else 0."""
    if teacher in chunk.available:
        return chunk.per_trajectory(chunk.available[teacher]).float()
    return torch.ones(len(chunk), device=chunk.index.device)


class Stopwatch:
    """Seconds and steps per phase since the last `read`.

    On a GPU a phase ends when its kernels are queued, so shares are exact only where something waits for the result
    (rollouts do); the sum of all phases is.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        self.since = time.perf_counter()

    def count(self, name: str, steps: int) -> None:
        self.steps[name] = self.steps.get(name, 0) + steps

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Each phase's share of the time and its steps per second, then starts anew."""
        now = time.perf_counter()
        total = now - self.since
        values = {f"time/{phase}_share": spent / total for phase, spent in self.seconds.items()}
        values |= {
            f"speed/{phase}_steps_per_s": self.steps[phase] / spent
            for phase, spent in self.seconds.items()
            if phase in self.steps
        }
        self.seconds, self.steps, self.since = {}, {}, now
        return values
