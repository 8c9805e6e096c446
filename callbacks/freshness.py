"""FreshnessControl: how much a stale trajectory counts, and when stale ones are thrown away (f-OPD).

Shape legend: B trajectories of an optimizer step on this rank, n steps of a chunk.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ..callback import DistillationCallback
from ..module import OnPolicyDistillation
from ..objective import ReverseKL, Signal, Term
from ..objective.steps import OpenSteps, Steps
from ..optimizer_step import OptimizerStep
from ..policy import View
from ..rollout import RolloutLoader
from ..trajectory import Trajectories

Settings = dict[str, Any]
FOREVER = 2**62
LARGEST = 40.0  # a log-ratio beyond it counts nothing any more, and would overflow


class Anchor(Signal):
    """KL(p_then ‖ p_now) of the weights that acted and the student, estimated at the step that was taken.

    With ρ = p_now/p_then it is ρ − 1 − log ρ: never negative, without gradient where nothing moved, and on average the
    KL divergence if steps are drawn from p_then as it is (temperature 1, no filters); otherwise it leans towards likely
    steps. What another policy did has no anchor: 0.

    f-OPD (2605.17862) has KL(p_now ‖ p_then), over all that could have been done, for which the old weights would have
    to be kept. The two agree to second order, and Pinsker's inequality, from which freshness is derived, holds for
    both; but steps drawn from p_then say next to nothing of the paper's once the student has left them.
    """

    def __call__(self, steps: OpenSteps) -> Tensor:
        of_student = steps.per_trajectory(_by_student(steps.trajectories))
        log_ratio = torch.where(of_student, steps.student.log_prob(steps.action) - steps.behavior_log_prob, 0.0)
        log_ratio = log_ratio.clamp(max=LARGEST)
        # expm1 keeps the digits where little has moved
        return log_ratio.expm1() - log_ratio


class FreshnessControl(DistillationCallback):
    """Freshness control of f-OPD (2605.17862): every trajectory has a freshness, which decides how much it counts.

    With τ optimizer steps between acting and training,

        f = 1/(τ + 1) · exp(−(α·√D_roll + β·√D_sup)),    w = max(0, f − ξ),

    and the loss of a trajectory, with λ times its `Anchor`, counts w times; no gradient flows through w. D_roll is the
    mean over its steps of the student's KL divergence from then to now, as `Anchor` estimates it. D_sup is that of
    KL(teacher seeing what its view shows now ‖ seeing what it showed then), with the teacher's weights of now on both
    sides; it is 0 unless a knob of the view has been turned since, and the largest of several teachers' counts. Where
    a teacher had something to say only now or only then, f is 0. Trajectories of other policies than the student do
    not grow stale: f is 1.

    When the mean freshness of an optimizer step falls to ``refresh_below``, what was rolled out and not trained is
    thrown away and rolled out again. The paper's other two refresh rules ask for states that can't be replayed; here
    all can.

    α = β = λ = 0 is the simple mode, which goes by the lag alone and costs no forward pass. Otherwise an optimizer step
    on stale trajectories costs one more of the student, and two of each teacher whose view has changed.

    Where a term's normalizer is ``steps``, small weights make small steps, as in the paper (whose loss is a mean over
    trajectories of means over their steps, while ``steps`` counts all trained steps alike); with ``weights`` only their
    proportions count. Logged, as means: ``train/freshness/score``, ``weight``, ``gated`` (share of trajectories that
    count nothing), ``lag``, ``rollout_drift``, ``supervision_drift`` and ``refreshes``.

    Example::

        callbacks+:
          - class_path: FreshnessControl
            init_args: {refresh_every: 50}

    Args:
        rollout_drift: α. Default 1. The paper prints none of these five values. The defaults are ours: of seven
            settings tried, they alone do better at a lag of 16 than no control at all (docs/claims.md).
        supervision_drift: β. Default 1.
        threshold: ξ. Default 0.01; f is at most 1/(τ + 1), so that a lag of 1/ξ − 1 trains nothing.
        anchor: λ. Default 0.1; 0 adds no term.
        refresh_below: κ. Default 0.1; 0 refreshes only if every trajectory is invalid.
        refresh_every: optimizer steps between two refreshes, at least. Default 10; the paper, with longer runs and
            lags up to 8, has 200. A refresh throws up to `max_staleness` generation batches away.

    Raises:
        ValueError: a value out of range.
    """

    remembers = ("refreshed", "shown")

    def __init__(
        self,
        rollout_drift: float = 1.0,
        supervision_drift: float = 1.0,
        threshold: float = 0.01,
        anchor: float = 0.1,
        refresh_below: float = 0.1,
        refresh_every: int = 10,
    ) -> None:
        if min(rollout_drift, supervision_drift, anchor) < 0 or refresh_every < 1:
            raise ValueError(
                f"FreshnessControl: rollout_drift={rollout_drift}, supervision_drift={supervision_drift} and "
                f"anchor={anchor} must be >= 0, refresh_every={refresh_every} >= 1"
            )
        if not 0 <= threshold < 1 or not 0 <= refresh_below < 1:
            raise ValueError(
                f"FreshnessControl: threshold={threshold} and refresh_below={refresh_below} must be in [0, 1)"
            )
        self.rollout_drift, self.supervision_drift, self.threshold = rollout_drift, supervision_drift, threshold
        self.anchor, self.refresh_below, self.refresh_every = anchor, refresh_below, refresh_every
        # long ago, so that the first refresh need not wait
        self.refreshed, self._is_stale = -FOREVER, False
        # pairs of an optimizer step and the settings that every teacher's view had from then on
        self.shown: list[list[Any]] = []
        self.terms = (Term(Anchor(), teacher=None, coefficient=anchor, name="anchor"),) if anchor else ()

    def on_optimizer_step_start(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        self._remember(module, step)
        scores = [self._score(module, trajectories) for trajectories in step.trajectories]
        for trajectories, score in zip(step.trajectories, scores, strict=True):
            weight = (score - self.threshold).relu()
            trajectories.weigh(weight.float().to(trajectories.mask.device))
            module.record("freshness/weight", weight)
            module.record("freshness/gated", (weight == 0).double())
        mean = float(module.gather(torch.cat(scores).to(module.device)).mean())
        self._is_stale = mean <= self.refresh_below

    def on_optimizer_step_end(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        done = module.global_step
        refreshes = self._is_stale and done - self.refreshed >= self.refresh_every
        module.record("freshness/refreshes", float(refreshes))
        if refreshes:
            assert isinstance(module.trainer.train_dataloader, RolloutLoader)
            module.trainer.train_dataloader.refresh()
            self.refreshed = done
            rank_zero_info(f"FreshnessControl: step {done}: rollouts were too stale, rolling out again")

    def _score(self, module: OnPolicyDistillation, batch: Trajectories) -> Tensor:
        """Computes freshness ``[B]``."""
        batch = batch.to("cpu")
        lag = module.global_step - batch.weights_version
        acted = _by_student(batch)
        rollout = torch.zeros(len(batch))
        # the same on every rank, whoever acted there: a sharded student must be asked by all or none
        if self.rollout_drift and "student" in batch.sources and bool((lag > 0).any()):
            measured = _row_means(module.per_step(batch, Anchor()), batch.mask)
            rollout = torch.where(acted & (lag > 0), measured, 0.0)
        supervision = self._supervision(module, batch) if self.supervision_drift else torch.zeros(len(batch))
        drift = self.rollout_drift * rollout.clamp(min=0).sqrt() + self.supervision_drift * supervision.sqrt()
        fresh = torch.where(acted, (-drift).exp() / (lag + 1), 1.0)
        for name, values in (("score", fresh), ("lag", lag), ("rollout_drift", rollout)):
            module.record(f"freshness/{name}", values)
        known = supervision.isfinite()
        module.record("freshness/supervision_drift", supervision.where(known, 0.0), known.double())
        return fresh

    def _supervision(self, module: OnPolicyDistillation, batch: Trajectories) -> Tensor:
        """Computes D_sup ``[B]``; infinite where it is unknown."""
        drift = torch.zeros(len(batch))
        for name in sorted(module.objective.teachers()):
            teacher = module.teachers[name]
            for version in batch.weights_version.unique().tolist():
                then = self._settings_at(version).get(name)
                indices = (batch.weights_version == version).nonzero().squeeze(-1)
                if teacher.view is not None and then is not None and then != _settings(teacher.view):
                    moved = self._moved(module, name, batch.select(indices), _with(teacher.view, then))
                    drift[indices] = torch.maximum(drift[indices], moved)
        return drift

    @torch.no_grad()
    def _moved(self, module: OnPolicyDistillation, name: str, batch: Trajectories, view: View) -> Tensor:
        """Computes how far ``[B]`` a teacher's distributions have moved since it had this view."""
        batch = batch.to(module.device)
        with module.trainer.precision_plugin.forward_context():
            now, then = module.streams.query(name, batch), module.streams.query(name, batch, view)
            here, there = now.available, then.available
            assert here is not None
            assert there is not None
            steps = Steps.of(batch, {name: here & there})
            values = module.objective.per_step(now.distribution, {name: then}, steps, ReverseKL(), name)
        moved = _row_means(values, batch.mask)
        moved = torch.where(here & there, moved, torch.where(here | there, torch.inf, 0.0))
        return moved.clamp(min=0).cpu()

    def _remember(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        now = {name: _settings(t.view) for name, t in module.teachers.items() if t.view is not None}
        if not self.shown or self.shown[-1][1] != now:
            self.shown.append([module.global_step, now])
        oldest = min(int(batch.weights_version.min()) for batch in step.trajectories)
        # settings that no trajectory was shown any more
        while len(self.shown) > 1 and self.shown[1][0] <= oldest:
            self.shown.pop(0)

    def _settings_at(self, version: int) -> dict[str, Settings]:
        until = [settings for since, settings in self.shown if since <= version]
        return until[-1] if until else self.shown[0][1]  # older than what this callback has seen of the run


def _by_student(batch: Trajectories) -> Tensor:
    """Marks trajectories ``[B]`` (bool) by the student."""
    return torch.tensor([name == "student" for name in batch.sources], device=batch.source.device)[batch.source]


def _row_means(values: Tensor, mask: Tensor) -> Tensor:
    """Averages ``[B, T]`` over the trained steps, ``[B]``; 0 where there are none, since they count nothing."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)


def _settings(view: View) -> Settings:
    """Collects the settings of a view, and of the views that it is made of, by path."""
    settings: Settings = {}
    for name, value in vars(view).items():
        if isinstance(value, View):
            settings |= {f"{name}.{path}": inner for path, inner in _settings(value).items()}
        elif isinstance(value, int | float | str):
            settings[name] = value
    return settings


def _with(view: View, settings: Settings) -> View:
    """Copies a view with these settings."""
    copied = copy.copy(view)
    for name, value in vars(view).items():
        inner = {path.removeprefix(f"{name}."): v for path, v in settings.items() if path.startswith(f"{name}.")}
        if inner:
            setattr(copied, name, _with(value, inner))
        elif name in settings:
            setattr(copied, name, settings[name])
    return copied
