"""Metrics of optimizer steps: weighted averages that add up over chunks, micro-batches and ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .heart import HEART


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
        HEART.phase = name
        HEART.beat()
        try:
            yield
        finally:
            HEART.beat()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Returns each phase's share of the time, its steps and its steps per second, and starts anew."""
        now = time.perf_counter()
        total = now - self.since
        values = {f"time/{phase}_share": spent / total for phase, spent in self.seconds.items()}
        values |= {f"steps/{phase}": float(steps) for phase, steps in self.steps.items()}
        values |= {
            f"speed/{phase}_steps_per_s": self.steps[phase] / spent
            for phase, spent in self.seconds.items()
            if phase in self.steps
        }
        self.seconds, self.steps, self.since = {}, {}, now
        return values
