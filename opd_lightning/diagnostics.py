"""Metrics of optimizer steps: weighted averages that add up over chunks, micro-batches and ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .heart import HEART

Counts = tuple[dict[str, float], dict[str, int], dict[str, float], dict[str, float], dict[str, int]]
"""Seconds, steps, waits, operations and places."""


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

    def add_clipped(self, name: str, values: Tensor, on: Tensor) -> None:
        """Adds the share of a term's steps that one of its weights sets to 0; ``name``: ``<term>/<weight>``."""
        self.add(f"clipped/{name}", (values == 0) & on, on.float())

    def merge(self, other: Averages) -> None:
        for name, pair in other.sums.items():
            pair = pair.to(self.device)
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def compute(self) -> dict[str, float]:
        """Computes the means, with one transfer from the device."""
        if not self.sums:
            return {}
        table = torch.stack(list(self.sums.values())).tolist()
        return {name: s / c for name, (s, c) in zip(self.sums, table, strict=True) if c > 0}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: pair.cpu() for name, pair in self.sums.items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], device: torch.device | str = "cpu") -> Averages:
        averages = cls(device)
        averages.sums = {name: pair.to(device) for name, pair in state.items()}
        return averages


class Stopwatch:
    """Seconds, steps and work since the last `read`.

    On a GPU a phase ends when its kernels are queued, so shares are exact only where something waits for the result
    (rollouts do); the sum of all phases is.

    Attributes:
        seconds, steps: of each phase.
        flops: floating-point operations that models needed, by their part: student, teacher, head.
        places: of forward passes in which policies are asked, and those of them that are padding.
        peak: operations a second that the device can do; None: nobody knows.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.steps: dict[str, int] = {}
        self.flops: dict[str, float] = {}
        self.places: dict[str, int] = {}
        self.peak: float | None = None
        self.since = time.perf_counter()

    def count(self, name: str, steps: int) -> None:
        self.steps[name] = self.steps.get(name, 0) + steps

    def compute(self, part: str, flops: float) -> None:
        """Counts operations of a part."""
        self.flops[part] = self.flops.get(part, 0.0) + flops

    def read_through(self, places: int, padding: int) -> None:
        """Counts the places of a forward pass, and those of them that are padding."""
        for name, number in (("all", places), ("padding", padding)):
            self.places[name] = self.places.get(name, 0) + number

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        HEART.phase = name
        HEART.beat()
        try:
            yield
        finally:
            HEART.beat()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Returns each phase's share of the time, its steps and its steps per second, and starts anew.

        Besides, where there were any: the shares of time that training waited for a worker and for a server, which are
        within phases; the share of padding; and, on a device whose peak is known, the model FLOP utilization of
        student, teacher and head, and of all of them, in the time that was left by rollouts and rewards.
        """
        now = time.perf_counter()
        total = now - self.since
        values = {f"time/{phase}_share": spent / total for phase, spent in self.seconds.items()}
        values |= {f"steps/{phase}": float(steps) for phase, steps in self.steps.items()}
        values |= {
            f"speed/{phase}_steps_per_s": self.steps[phase] / spent
            for phase, spent in self.seconds.items()
            if phase in self.steps
        }
        values |= {f"time/waited_{whom}_share": spent / total for whom, spent in HEART.held_up.items()}
        if self.places:
            values["work/padding_share"] = self.places["padding"] / self.places["all"]
        if self.peak is not None and self.flops:
            possible = self.peak * (total - sum(self.seconds.get(name, 0.0) for name in ("rollout", "reward")))
            values["work/mfu"] = sum(self.flops.values()) / possible
            values |= {f"work/mfu_{part}": flops / possible for part, flops in self.flops.items()}
        self.restore(({}, {}, {}, {}, {}))
        self.since = now
        return values

    def set_aside(self) -> Counts:
        """Copies what was counted since the last `read`."""
        return dict(self.seconds), dict(self.steps), dict(HEART.held_up), dict(self.flops), dict(self.places)

    def restore(self, counts: Counts) -> None:
        """Forgets what was counted since `set_aside`, as if it had not been."""
        self.seconds, self.steps, HEART.held_up, self.flops, self.places = counts
