"""Metrics: records between two logged steps, and the time of each phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .diagnostics import Averages, Stopwatch
from .heart import HEART
from .ranks import Ranks
from .trajectory import Trajectories

SHOWN_RANKS = 16
"""Ranks up to which all are logged one by one."""
WORK = frozenset({"rollout", "reward", "teacher", "student", "objective"})
"""Phases without collectives of gradients, in which a rank that takes longer holds up the others."""


def is_logged(trainer: Any, step: int) -> bool:
    """Tells whether records are logged after that many optimizer steps."""
    every: int = trainer.log_every_n_steps
    return step == 1 or (every > 0 and step % every == 0)


def forget_logged(trainer: Any, step: int) -> None:
    """Resets what was logged of earlier steps when ``step`` of them are done; Lightning would go on logging it.

    Loggers get the number of that step, too: a run that goes on from where another one ended would count one twice.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step
    every: int = trainer.log_every_n_steps
    if every and step % every == 0:
        for result in (trainer._results or {}).values():
            if not result.meta.on_epoch:
                result.reset()


class Metrics:
    """Means of what was recorded since the last logged step, on this rank.

    Attributes:
        averages: sums and counts, by name.
        stopwatch: seconds and steps of each phase.
        gauges: further values of the next logged step, by their whole names.
        logged: those of the last logged step.
    """

    def __init__(self) -> None:
        self.averages, self.stopwatch = Averages(), Stopwatch()
        self.gauges: dict[str, float] = {}
        self.logged: dict[str, float] = {}

    def record(self, name: str, values: Tensor | float, counts: Tensor | float | None = None) -> None:
        """Adds ``values`` (any shape); ``counts`` says how much each weighs in the mean (default: 1)."""
        self.averages.add(name, values, counts)

    def describe(self, batch: Trajectories, step: int) -> None:
        """Records lengths, ends and lags of trajectories that are trained after ``step`` optimizer steps."""
        self.record("length", batch.length)
        self.record("stopped", batch.stopped.float())
        self.record("staleness", (step - batch.weights_version).float())
        if (turn := batch.channels.get("turn")) is not None:
            self.record("turns", (turn * batch.mask).amax(1) + 1)
            self.record("observed", batch.extent - batch.length)
        for name in {"read", "failures"} & batch.channels.keys():  # of each turn, at its last step
            self.record(name, batch.channels[name].sum(1))

    def recorded(self, ranks: Ranks) -> dict[str, float]:
        """Means over all ranks, by name; every rank must ask."""
        return over_ranks(self.averages, ranks).compute()

    def of_step(self, ranks: Ranks) -> dict[str, float]:
        """Collects what is logged of a step, by whole names; every rank must ask."""
        recorded = {f"train/{name}": value for name, value in self.recorded(ranks).items()}
        spent, waited = dict(self.stopwatch.seconds), dict(HEART.waited)
        HEART.waited.clear()
        self.logged = recorded | self.stopwatch.read() | self.gauges
        if ranks.count > 1:
            self.logged |= by_rank(ranks.gather_objects((spent, waited)))
        return dict(self.logged)

    def begin(self, sums: dict[str, Tensor], device: torch.device) -> None:
        """Begins anew, with the sums of a checkpoint."""
        self.averages = Averages.from_state_dict(sums, device)


def by_rank(seconds: Sequence[tuple[dict[str, float], dict[str, float]]]) -> dict[str, float]:
    """Names the seconds of each rank since the last logged step: its work by phase, and its waits in collectives.

    Args:
        seconds: of each rank, spent by phase, and of these and besides, in collectives after a phase began.

    Returns:
        ``ranks/slowest``, the rank that worked longest, and of each rank, of more than `SHOWN_RANKS` the slowest and
        the fastest alone: ``rank<r>/<phase>_s`` and ``rank<r>/waited_<phase>_s``.
    """
    worked = [sum(spent[name] - waited.get(name, 0.0) for name in spent if name in WORK) for spent, waited in seconds]
    slowest, fastest = worked.index(max(worked)), worked.index(min(worked))
    values = {"ranks/slowest": float(slowest)}
    for rank, (spent, waited) in enumerate(seconds):
        if len(seconds) <= SHOWN_RANKS or rank in (slowest, fastest):
            values |= {f"rank{rank}/{name}_s": value for name, value in spent.items()}
            values |= {f"rank{rank}/waited_{name}_s": value for name, value in waited.items()}
    return values


def over_ranks(averages: Averages, ranks: Ranks) -> Averages:
    """Adds the sums and counts of all ranks; every rank must ask."""
    if ranks.count == 1:
        return averages
    total = Averages()
    for sums in ranks.gather_objects(averages.state_dict()):
        total.merge(Averages.from_state_dict(sums))
    return total
