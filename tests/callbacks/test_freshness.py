"""Freshness: what it falls with, what it gates, when it refreshes, and that a resumed run goes on alike."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from opd_lightning.callbacks import (
    Anchor,
    ChangePoint,
    Curriculum,
    EarlyStopRollout,
    FirstSteps,
    FreshnessControl,
    Linear,
    Piecewise,
)
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Frozen, Teacher
from tests.callbacks import toy
from tests.tiny import act, log_softmax

STALE = {"batch_size": 8, "micro_batch_size": 4, "max_staleness": 2}


class Notes(L.Callback):
    """Lag and weight of every trajectory, per optimizer step."""

    def __init__(self) -> None:
        self.lags: list[list[int]] = []
        self.weights: list[torch.Tensor] = []
        self.parts: list[Any] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        parts = batch.step.trajectories
        self.lags.append([int(trainer.global_step - v) for part in parts for v in part.weights_version])
        self.weights.append(torch.cat([part.weight for part in parts]).cpu())
        self.parts.append(parts)


def run(folder: Path, control: FreshnessControl, *others: L.Callback, steps: int = 6, **settings: Any):
    """A run on the toy, and the notes that were taken of it."""
    notes = Notes()
    module = settings.pop("module", None) or toy.make_module(rollout=Rollout(**STALE, horizon=6), **settings)
    trainer = toy.fit(module, folder, [*others, control, notes], steps=steps)
    return trainer, notes, module


def test_fresh_trajectories_count_fully_and_their_anchor_is_nothing(tmp_path):
    fresh = FreshnessControl(threshold=0.25)
    trainer, notes, _ = run(tmp_path, fresh, steps=3, module=toy.make_module())
    assert all(torch.equal(weight, torch.full((8,), 0.75)) for weight in notes.weights)
    assert trainer.callback_metrics["train/freshness/score"] == 1
    assert trainer.callback_metrics["train/loss/anchor"] == pytest.approx(0, abs=1e-9)


def test_the_anchor_has_no_gradient_where_nothing_moved_and_is_the_kl_where_it_did(make_world):
    module = make_world("text").module()
    rolled = act(module, make_world("text").make_rows(24), horizon=6)
    objective = Objective([Term(Anchor(), teacher=None)])
    student = module.distribution(module.policies["student"], rolled)
    objective(student, {}, rolled)[0].backward()
    assert max(float(p.grad.abs().max()) for p in module.student.parameters() if p.grad is not None) < 1e-5

    # by enumeration: the mean of the estimate over all steps that the old policy could have taken is the KL
    before = log_softmax(module, "student", rolled)[rolled.mask]
    with torch.no_grad():
        for weight in module.student.parameters():
            weight.mul_(1.05)
    after = log_softmax(module, "student", rolled)[rolled.mask]
    ratio = after - before
    finite = before.isfinite()
    estimate = torch.where(finite, ratio.expm1() - ratio, 0.0)
    kl = torch.where(finite, before.exp() * -ratio, 0.0).sum(-1)
    assert torch.allclose((before.exp() * estimate).sum(-1), kl, atol=1e-5)


def test_the_simple_mode_goes_by_the_lag_alone(tmp_path):
    asked = []

    class Counts(toy.Moves):
        def per_step(self, *args):
            asked.append(args)
            return super().per_step(*args)

    simple = FreshnessControl(rollout_drift=0, supervision_drift=0, threshold=0, anchor=0)
    _, notes, module = run(tmp_path, simple, setting=Counts)
    assert max(max(lags) for lags in notes.lags) > 2
    for lags, weights in zip(notes.lags, notes.weights, strict=True):
        assert weights.tolist() == pytest.approx([1 / (lag + 1) for lag in lags])
    assert not asked
    assert len(module.objective.terms) == 1


def test_freshness_falls_with_the_lag_and_with_the_students_drift(tmp_path):
    def weights(name: str, rate: float, **settings: float) -> torch.Tensor:
        control = FreshnessControl(threshold=0, anchor=0, refresh_below=0, **settings)
        return run(tmp_path / name, control, optimizer=lambda p: torch.optim.SGD(p, lr=rate))[1].weights[-1]

    still, slow, fast = (weights(str(rate), rate) for rate in (0.0, 0.01, 0.1))
    assert (still > slow).all()
    assert (slow > fast).all()
    assert (weights("alpha", 0.01, rollout_drift=3.0) < slow).all()
    assert torch.allclose(weights("off", 0.1, rollout_drift=0.0), still)


def test_a_fixed_teacher_with_an_unchanged_view_has_no_supervision_drift(tmp_path):
    teachers = {"teacher": Teacher(EMA(0.2), view=toy.Told())}
    trainer, _, _ = run(tmp_path, FreshnessControl(refresh_below=0), teachers=teachers)
    assert trainer.callback_metrics["train/freshness/supervision_drift"] == 0
    assert trainer.callback_metrics["train/freshness/rollout_drift"] > 0


def test_a_view_that_was_turned_makes_older_trajectories_stale(tmp_path):
    """At step 3 the teacher is told less; trajectories from before it drift, later ones don't."""
    told = Curriculum({"teachers.teacher.view.strength": Piecewise({0: 2.0, 3: 1.0})})
    module = toy.make_module(
        {"teacher": Teacher(EMA(0.0), view=toy.Told())},
        rollout=Rollout(**STALE, horizon=6),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
    )
    control = FreshnessControl(supervision_drift=0.5, threshold=0, anchor=0, refresh_below=0)
    _, notes, _ = run(tmp_path, control, told, steps=10, module=module)

    def drift(batch) -> torch.Tensor:
        """KL between the two Gaussians that the teacher says, before and after, in closed form."""
        means = [
            module.distribution(module.policies["teacher"], batch, [toy.Told(s)(e) for e in batch.examples]).mean
            for s in (1.0, 2.0)
        ]
        kl = ((means[0] - means[1]) / toy.SCALE).square().sum(2) / 2
        return (kl * batch.mask).sum(1) / batch.length

    for step, (lags, weights, parts) in enumerate(zip(notes.lags, notes.weights, notes.parts, strict=True)):
        with torch.no_grad():
            drifts = torch.cat([drift(part) for part in parts]).tolist()
        for lag, weight, moved in zip(lags, weights.tolist(), drifts, strict=True):
            assert moved > 0
            since = math.sqrt(moved) if step >= 3 > step - lag else 0.0
            assert weight == pytest.approx(math.exp(-0.5 * since) / (lag + 1), rel=1e-4), (step, lag)
    assert control.state_dict()["shown"] == [[3, {"teacher": {"strength": 1.0}}]], "what nobody needs is forgotten"


class Sometimes(toy.Told):
    """Shows nothing at all unless its strength is positive."""

    def __call__(self, example):
        return super().__call__(example) if self.strength else None


def test_a_trajectory_whose_teacher_came_or_went_is_invalid(tmp_path):
    told = Curriculum({"teachers.teacher.view.strength": Piecewise({0: 0.0, 3: 1.0})})
    teachers = {"teacher": Teacher(EMA(0.0), view=Sometimes())}
    control = FreshnessControl(threshold=0, anchor=0, refresh_below=0)
    _, notes, _ = run(tmp_path, control, told, steps=5, teachers=teachers)
    assert notes.weights[2].min() > 0
    assert notes.weights[3].max() == 0


def test_what_is_gated_has_exactly_no_gradient(tmp_path):
    def trained(name: str, steps: int) -> Any:
        control = FreshnessControl(threshold=0.9, refresh_below=0)
        return run(tmp_path / name, control, steps=steps, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))

    trainer, notes, module = trained("whole", 4)
    assert notes.weights[0].min() > 0
    assert all(weights.max() == 0 for weights in notes.weights[1:])
    assert trainer.callback_metrics["train/freshness/gated"] == 1
    first = dict(trained("first", 1)[2].named_parameters())
    assert all(torch.equal(weight, first[name]) for name, weight in module.named_parameters())


def test_a_student_that_was_thrown_far_off_counts_nothing_instead_of_nan(tmp_path):
    far = {"optimizer": lambda p: torch.optim.SGD(p, lr=30.0)}
    _, notes, module = run(tmp_path, FreshnessControl(refresh_below=0), steps=4, **far)
    stale = [w for w, lags in zip(notes.weights, notes.lags, strict=True) if min(lags) > 0]
    assert stale
    assert all(weights.max() == 0 for weights in stale)
    assert all(weight.isfinite().all() for weight in module.parameters())


def test_stale_rollouts_are_thrown_away_but_not_too_often(tmp_path):
    control = FreshnessControl(rollout_drift=0, anchor=0, refresh_below=0.3, refresh_every=5)
    _, notes, _ = run(tmp_path, control, steps=14)
    fresh = [step for step, lags in enumerate(notes.lags) if max(lags) == 0]
    assert fresh[0] == 0
    assert len(fresh) > 2
    assert all(later - sooner >= 5 for sooner, later in pairwise(fresh[1:]))
    never = FreshnessControl(rollout_drift=0, anchor=0, refresh_below=0)
    _, notes, _ = run(tmp_path / "never", never, steps=14)
    assert [step for step, lags in enumerate(notes.lags) if max(lags) == 0] == [0]


@pytest.mark.parametrize("behavior", [{"student": 0.5, "teacher": 0.5}, {"teacher": 1.0}])
def test_what_another_policy_did_does_not_grow_stale(behavior, tmp_path):
    rollout = Rollout(batch_size=8, micro_batch_size=2, horizon=6, behavior=behavior)
    control = FreshnessControl(threshold=0, refresh_below=0)
    trainer, notes, _ = run(tmp_path, control, module=toy.make_module(rollout=rollout), steps=4)
    weights = torch.cat(notes.weights[1:])
    assert bool((weights < 1).any()) == ("student" in behavior)
    assert (weights == 1).any()
    assert math.isfinite(trainer.callback_metrics["train/loss/anchor"])


def test_given_completions_have_no_anchor(make_world, tmp_path):
    world = make_world("text")
    rollout = Rollout(batch_size=8, micro_batch_size=4, horizon=6, behavior={"dataset": 1.0})
    module = world.module(rollout=rollout)
    trainer = world.fit(module, tmp_path, steps=3, callbacks=[FreshnessControl()])
    assert trainer.callback_metrics["train/loss/anchor"] == 0
    assert all(weight.isfinite().all() for weight in module.student.parameters())


def test_it_composes_and_resumes(tmp_path):
    def make():
        frozen = Teacher(Frozen(toy.Pretrained("1")), view=toy.Told())
        module = toy.make_module({"teacher": frozen}, rollout=Rollout(**STALE, horizon=6))
        grows = Curriculum({"rollout.horizon": Linear(3, 9, 6), "teachers.teacher.view.strength": Linear(2, 0, 5)})
        early = EarlyStopRollout(ChangePoint("log_prob", block=2, fewest=1))
        return module, [FreshnessControl(refresh_below=0.25, refresh_every=3), grows, early]

    toy.assert_resumes(make, tmp_path, steps=8)


def test_it_can_join_a_run_that_began_without_it(tmp_path):
    def make():
        return toy.make_module({"teacher": Teacher(EMA(0.1), view=toy.Told())}, rollout=Rollout(**STALE, horizon=6))

    toy.fit(make(), tmp_path, steps=4)
    toy.fit(make(), tmp_path / "on", [FreshnessControl()], steps=6, checkpoint=tmp_path / "step-4.ckpt")


def test_it_works_on_text(make_world, tmp_path):
    world = make_world("text")
    module = world.module(rollout=Rollout(**STALE, horizon=10), objective=Objective([Term(ReverseKL())]))
    others = [EarlyStopRollout(FirstSteps(6)), Curriculum({"rollout.temperature": Linear(1, 0.5, 4)})]
    trainer = world.fit(module, tmp_path, steps=5, callbacks=[FreshnessControl(), *others])
    assert 0 < trainer.callback_metrics["train/freshness/score"] < 1
    assert trainer.callback_metrics["train/freshness/lag"] > 0
    assert trainer.callback_metrics["train/loss/anchor"] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FreshnessControl(anchor=-1), r"anchor=-1 must be >= 0"),
        (lambda: FreshnessControl(threshold=1), r"threshold=1 and refresh_below=0\.1 must be in \[0, 1\)"),
    ],
)
def test_values_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
