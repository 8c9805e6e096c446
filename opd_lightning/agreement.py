"""The comparison before the first step: what a policy says of a step depends neither on who else is in its batch, nor
on the mode of its model, nor on whether it acts or is asked.

Shape legend: B trajectories, T steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from .actor import Actor
from .audit import show
from .comparisons import ACTED, MEANING, TOGETHER, TRAINING
from .contract import check_family
from .diagnostics import Stopwatch
from .distribution import Gaussian, Stream
from .objective import Objective, OpenSteps, Steps
from .policy import evaluating
from .progress import phase
from .ranks import Ranks
from .rollout import RolloutLoader
from .rollout_settings import derived_seed
from .rows import row_of
from .streams import Streams
from .trajectory import Example, Trajectories

AGREEMENT_DRAWS = 2**33  # keeps the seeds apart from those of rollouts and of evaluation
# Nats, over the steps of a row on average. Where nothing was wrong 1e-4 was the most that was seen in float32, and 0.02
# in bfloat16; dropout of 0.1 makes 0.1 to 0.3
EXACT, ROUNDED = 1e-3, 5e-2


@dataclass
class Agreement:
    """Before training some rows are acted on and replayed, alone, together and in training mode; where these differ
    the run does not start.

    Args:
        rows: how many, spread over the training data; every policy that acts is let act on them once.
        tolerance: how far the log-probs of a row's actions may be apart, in nats, on average over its steps (and, where
            an action is made of several numbers, over those). Default: 0.001 in float32, 0.05 for models that are
            computed in half precision or quantized, or the tolerance of a rollout engine that has one of its own.

    Raises:
        ValueError: fewer than 2 rows, which could not influence each other, or a tolerance that is not positive.
    """

    rows: int = 4
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise ValueError(f"agreement.rows={self.rows}: it takes 2 or more to see that rows influence each other")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"agreement.tolerance must be > 0, got {self.tolerance}")


def check_agreement(
    settings: Agreement, actor: Actor, streams: Streams, objective: Objective, trainer: Any, is_noisy: bool
) -> None:
    """Compares, and prints the table. Neither random numbers nor what is recorded of the run are touched by it.

    Args:
        settings: which rows, and how far apart.
        actor, streams: whose policies are compared.
        objective: which teachers are asked, and in what chunks.
        trainer: of the run.
        is_noisy: whether the student is asked to say something else in training mode.

    Raises:
        RuntimeError: a policy disagrees with itself; the message says which, how far, and what may be the cause.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, RolloutLoader):
        return
    with isolate_rng(), phase("comparing rollouts with their replay"):
        comparison = Comparison(settings, actor, streams, objective, loader)
        comparison.run()
    show("agreement (nats)", list(streams.policies), comparison.rows())
    complaints = comparison.complaints(is_noisy)
    # ranks may round differently, and one that goes on would wait for the others for ever
    if Ranks(trainer).total(float(bool(complaints))):
        raise RuntimeError("\n".join(complaints) or "a policy disagrees with itself on another rank")


class Comparison:
    """How far what each policy says of the same steps is apart, by policy and by what was compared."""

    def __init__(
        self, settings: Agreement, actor: Actor, streams: Streams, objective: Objective, loader: RolloutLoader
    ) -> None:
        # with a stopwatch of its own: this is no part of the run
        self._streams = replace(streams, stopwatch=Stopwatch())
        self._settings, self._actor, self._objective, self._trainer = settings, actor, objective, loader.trainer
        self._size = loader.size
        count = min(settings.rows, len(loader.dataset))
        places = torch.linspace(0, len(loader.dataset) - 1, count).long().tolist()
        self._examples: list[Example] = [row_of(loader.dataset, place) for place in places]
        self._seeds = [derived_seed(loader.seed, AGREEMENT_DRAWS, place) for place in places]
        self.apart: dict[str, dict[str, float]] = {name: {} for name in streams.policies}

    def run(self) -> None:
        """Lets every source act, and everyone that is asked now say what it did; all ranks do the same."""
        # those of a blend by themselves, too, where what they say can be compared
        sources = self._actor.rollout.sources | self._actor.rollout.policies
        needed = self._actor.setting.asked_by_parts() | self._objective.teachers()
        off = set(self._streams.teachers) - needed - sources
        for source in sorted(sources):
            acted = self._actor.act(source, self._examples, self._seeds)
            if not acted.mask.any():
                raise ValueError(
                    f"rollout.behavior.{source}: none of {len(acted)} trajectories has a step that is trained (mask)"
                )
            with self._actor.precision():
                for name in sorted(set(self._streams.policies) - off):
                    together = self._ask(name, acted)
                    self._note(name, TOGETHER, together, self._ask(name, acted, size=1))
                    if name == source:
                        self._note(name, ACTED, together, acted.behavior_log_probs / _width(acted))
                    if name == "student":
                        self._note(name, TRAINING, together, self._ask(name, acted, self._size, training=True))

    @torch.no_grad()
    def _ask(self, name: str, acted: Trajectories, size: int | None = None, training: bool = False) -> Tensor:
        """Computes one policy's log-probs ``[B, T]`` of the actions, in batches of ``size`` rows.

        NaN where it is not defined, infinity where they are no numbers."""
        values = torch.full(acted.mask.shape, torch.nan, dtype=torch.float32)
        done = 0
        for part in acted.split(size or len(acted)):
            part = part.to(self._trainer.strategy.root_device)
            stream = self._queried(name, part, training)
            check_family(self._actor.setting, stream.distribution)
            log_probs = self._objective.per_step(stream.distribution, {}, Steps.of(part), _of_action).cpu()
            log_probs[part.mask.cpu()[:, : log_probs.shape[1]] & log_probs.isnan()] = torch.inf
            if stream.available is not None:
                log_probs[~stream.available.cpu()] = torch.nan
            values[done : done + len(part), : log_probs.shape[1]] = log_probs
            done += len(part)
        return values

    def _queried(self, name: str, part: Trajectories, training: bool) -> Stream:
        if name != "student":
            return self._streams.query(name, part)
        model = self._streams.policies["student"].model
        with _training(model) if training else evaluating(model):
            return Stream(self._streams.student(part))

    def _note(self, name: str, what: str, one: Tensor, other: Tensor) -> None:
        # ∞ − ∞ would be NaN, which stands for "not defined"
        apart = (one - other).abs().masked_fill(one == torch.inf, torch.inf).nanmean(1)
        known = apart[~apart.isnan()]
        if len(known):
            before = self.apart[name].get(what, 0.0)
            self.apart[name][what] = max(before, float(known.max()))

    def rows(self) -> list[tuple[str, dict[str, str]]]:
        """Lists the rows of the table: each comparison, with the difference of each policy and its tolerance."""
        return [
            (
                what,
                {
                    name: f"{apart[what]:.1e} of {self.tolerance(name, what):g}"
                    for name, apart in self.apart.items()
                    if what in apart
                },
            )
            for what in MEANING
        ]

    def tolerance(self, name: str, what: str) -> float:
        """Returns the tolerance in nats."""
        if self._settings.tolerance is not None:
            return self._settings.tolerance
        half = "16" in str(self._trainer.precision_plugin.precision)
        own = ROUNDED if half or is_rounded(self._streams.policies[name].model) else EXACT
        return max(own, self._actor.setting.acting_tolerance) if what == ACTED else own

    def complaints(self, is_noisy: bool) -> list[str]:
        """Writes a sentence for every policy and comparison beyond the tolerance, but for noise that was asked for."""
        return [
            self._complaint(name, what, value)
            for name, apart in self.apart.items()
            for what, value in apart.items()
            if not value <= self.tolerance(name, what) and not (what == TRAINING and is_noisy)
        ]

    def _complaint(self, name: str, what: str, value: float) -> str:
        policy = self._streams.policies[name]
        who = "the student" if name == "student" else f"the teacher {name!r}"  # no key, which would be looked up
        causes = "; ".join(self._actor.setting.suspects(policy, what))
        return (
            f"{who} ({policy.path}) disagrees with itself: {MEANING[what]} ({what}: {value:.3g} nats a step, "
            f"model.agreement.tolerance is {self.tolerance(name, what):g}), so the run does not start. "
            f"{'What may be the cause: ' + causes if causes else 'No cause is known'}."
        )


def is_rounded(model: nn.Module) -> bool:
    """Tells whether a model computes in half precision or TF32, or its weights are quantized."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    exact = {p.dtype for p in weights} <= {torch.float32, torch.float64} and not getattr(model, "is_quantized", False)
    tf32 = any(p.is_cuda for p in weights) and torch.get_float32_matmul_precision() != "highest"
    return tf32 or not exact


def _of_action(steps: OpenSteps) -> Tensor:
    """Computes the log-prob ``[n]`` of the actions, per number of each; without a density, the distance of the mean."""
    distribution: Any = steps.student
    if isinstance(distribution, Gaussian) and not bool((distribution.scale > 0).all()):
        return (distribution.mean - steps.action).flatten(1).square().mean(1).sqrt()
    return distribution.log_prob(steps.action) / _width(steps.trajectories)


def _width(trajectories: Trajectories) -> int:
    """Counts the numbers of an action."""
    return trajectories.actions[0, 0].numel()


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
