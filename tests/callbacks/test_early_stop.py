"""Rollouts that end early: what is generated, what is trained, and that a resumed run ends them where it would have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.callbacks import (
    AdaptiveWindow,
    ChangePoint,
    Curriculum,
    EarlyStopRollout,
    FirstSteps,
    Linear,
    LowCorrection,
    StopRule,
)
from opd_lightning.callbacks.early_stop.adaptive_window import gradient_of
from opd_lightning.callbacks.early_stop.change_point import falls_at
from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.objective import GroupRelative, Objective, PolicyGradient, ReverseKL, Term
from opd_lightning.rollout_settings import Rollout
from tests.callbacks import toy
from tests.tiny import LongerIsBetter, act, attach, fit, log_softmax, make_module, sgd, watch_queries


def watching(setting: Any, seen: list[Any]) -> Any:
    """The setting, which notes how wide generation was, and the mask that is trained."""

    class Watching(setting):
        def sample(self, *args):
            rolled = super().sample(*args)
            self.wide = rolled.mask.shape[1]
            return rolled

        def training_step(self, batch, batch_idx):
            seen.append((self.wide, batch.trajectories.mask.cpu()))
            return super().training_step(batch, batch_idx)

    return Watching


# -- known beforehand ---------------------------------------------------------------------------------------------


def test_first_steps_are_all_that_is_generated_and_asked_for(world, tmp_path, monkeypatch):
    asked, seen = [], list[Any]()
    watch_queries(monkeypatch, lambda name, batch: asked.append(batch.mask.shape[1]))
    module = world.module(setting=watching(world.setting, seen), evaluation=Evaluation(before=False))
    world.fit(module, tmp_path, steps=2, callbacks=[EarlyStopRollout(FirstSteps(4))])
    assert [wide for wide, _ in seen] == [4, 4]
    assert max(asked) <= 4
    assert all(bool(mask[:, 0].all()) for _, mask in seen)


def test_as_many_first_steps_as_there_are_change_nothing(tmp_path):
    plain, stopped = toy.make_module(), toy.make_module()
    toy.fit(plain, tmp_path / "a")
    toy.fit(stopped, tmp_path / "b", [EarlyStopRollout(FirstSteps(100))])
    assert stopped.rollout.horizon == plain.rollout.horizon, "no rule lengthens rollouts"
    for name, weight in plain.state_dict().items():
        assert torch.equal(stopped.state_dict()[name], weight)


def test_evaluation_keeps_the_horizon_that_was_configured(tmp_path):
    rows = [{**row, "start": [9.0, 9.0]} for row in toy.make_rows(4)]
    early = [EarlyStopRollout(FirstSteps(2))]
    trainer = toy.fit(toy.make_module(), tmp_path, early, steps=1, validation=rows)
    assert trainer.callback_metrics["val/length"] == 6
    assert trainer.callback_metrics["train/length"] <= 2


@pytest.mark.parametrize(("agreement", "horizons"), [(-1.0, [2, 2, 2, 2]), (1.0, [2, 4, 8, 12])])
def test_the_window_stays_where_directions_agree_and_grows_to_full_rollouts_where_they_do_not(
    agreement, horizons, tmp_path
):
    seen: list[Any] = []
    module = toy.make_module(rollout=Rollout(batch_size=8, horizon=12), setting=watching(toy.Moves, seen))
    window = EarlyStopRollout(AdaptiveWindow(smallest=2, every=1, agreement=agreement))
    trainer = toy.fit(module, tmp_path, [window], steps=4)
    assert [mask.shape[1] <= horizon for (_, mask), horizon in zip(seen, horizons, strict=True)] == [True] * 4
    assert trainer.callback_metrics["knob/rollout.horizon"] == horizons[-1]
    assert -1 <= trainer.callback_metrics["train/early_stop/agreement"] <= 1


def test_the_window_shrinks_again(tmp_path):
    module = toy.make_module(rollout=Rollout(batch_size=8, horizon=12))
    rule = AdaptiveWindow(smallest=2, every=1, agreement=1.0)
    toy.fit(module, tmp_path / "a", [EarlyStopRollout(rule)], steps=3)
    assert rule.horizon == 12
    rule.agreement = -1.0
    toy.fit(module, tmp_path / "b", [EarlyStopRollout(rule)], steps=1)
    assert rule.horizon == 6


def test_the_window_stays_where_no_less_would_do(tmp_path):
    """Whatever full rollouts are, they agree with themselves; that is no reason to give them up."""
    module = toy.make_module(rollout=Rollout(batch_size=8, horizon=12))
    rule = AdaptiveWindow(smallest=2, every=1, agreement=1 - 1e-6)
    toy.fit(module, tmp_path, [EarlyStopRollout(rule)], steps=6)
    assert rule.horizon == 12


def test_the_probe_serves_terms_of_several_sources_and_rewards_of_groups(tmp_path):
    terms = [Term(ReverseKL(), source="student"), Term(ReverseKL(), source="teacher", name="theirs")]
    terms.append(Term(PolicyGradient(GroupRelative()), teacher=None, source="student"))
    rollout = Rollout(batch_size=8, group_size=2, horizon=8, behavior={"teacher": 0.5, "student": 0.5})
    module = toy.make_module(objective=Objective(terms), rollout=rollout, reward=LongerIsBetter())
    rule = AdaptiveWindow(smallest=2, every=1, agreement=1.0, probe=8)
    toy.fit(module, tmp_path, [EarlyStopRollout(rule)], steps=2)
    assert rule.horizon == 8


def test_the_probe_sees_the_gradient_of_training(make_world, tmp_path):
    world = make_world("text")
    compared = []

    class Compares(world.setting):
        def training_step(self, batch, batch_idx):
            if batch.is_first:
                self.whole = self.trainer.train_dataloader.pending
            return super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer):
            before = [p.grad.clone() for p in self.student.parameters()]
            found = gradient_of(self, self.whole)
            compared.extend(zip(found, before, [p.grad for p in self.student.parameters()], strict=True))

    module = world.module(setting=Compares, rollout=Rollout(batch_size=8, micro_batch_size=4, horizon=10))
    world.fit(module, tmp_path, accumulate_grad_batches=2)
    for found, before, after in compared:
        assert torch.allclose(found, before, atol=1e-6)
        assert torch.equal(before, after)
    assert any(bool(found.any()) for found, _, _ in compared)


# -- known afterwards ---------------------------------------------------------------------------------------------


@given(
    high=st.floats(0.2, 5),
    drop=st.floats(0.1, 5),
    before=st.integers(3, 9),
    after=st.integers(3, 9),
    seed=st.integers(0, 99),
)
def test_a_clean_step_down_is_found_and_nothing_else(high, drop, before, after, seed):
    noise = 1e-3 * torch.randn(before + after, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step = torch.tensor([high] * before + [high - drop] * after, dtype=torch.float64)
    assert falls_at(step + noise, 3) == before
    assert falls_at(step, 3) == before
    assert falls_at(-step, 3) is None, "a step up"
    assert falls_at(torch.full_like(step, high), 3) is None
    assert falls_at(torch.arange(len(step)).double() * drop, 3) is None, "rising"
    assert falls_at(step, max(before, after) + 1) is None, "too few on a side"


class TeacherFails(toy.Moves):
    """From step 12 on the teacher means something else."""

    def distribution(self, policy, trajectories, view=None):
        said = super().distribution(policy, trajectories, view)
        if policy is self.policies["teacher"]:
            said.mean[:, 12:] += 9.0
        return said


def test_a_change_point_cuts_at_the_end_of_a_block(tmp_path):
    seen: list[Any] = []
    rows = [{**row, "start": [9.0, 9.0]} for row in toy.make_rows()]
    module = toy.make_module(rollout=Rollout(batch_size=8, horizon=24), setting=watching(TeacherFails, seen))
    early = EarlyStopRollout(ChangePoint("log_prob", block=4))
    trainer = toy.fit(module, tmp_path, [early], steps=1, rows=rows)
    assert seen[0][0] == 24, "generated in full"
    assert torch.equal(seen[0][1].sum(1), torch.full((8,), 12))
    assert trainer.callback_metrics["train/early_stop/kept"] == 0.5
    assert trainer.callback_metrics["train/early_stop/cut"] == 1
    assert trainer.callback_metrics["train/stopped"] == 0


@pytest.mark.parametrize("signal", ["margin", "confidence", "log_prob"])
def test_a_change_point_of_a_vocabulary_leaves_a_prefix(signal, make_world, tmp_path):
    world, seen = make_world("text"), []
    rule = ChangePoint(signal, block=2, fewest=1, candidates=4)
    world.fit(world.module(setting=watching(world.setting, seen)), tmp_path, callbacks=[EarlyStopRollout(rule)])
    ((_, mask),) = seen
    assert not (mask[:, 1:] & ~mask[:, :-1]).any()
    assert mask[:, 0].all()


def test_the_teachers_confidence_is_its_largest_probability(make_world, tmp_path):
    """LGR (2605.30833): max_u q(u), against softmax over all of the vocabulary; not 1 − H / log V."""
    module = make_world("text").module()
    attach(module, tmp_path)
    rolled = act(module, make_world("text").make_rows(6), horizon=5)
    values = module.per_step(rolled, ChangePoint("confidence")._read, "teacher")
    dense = log_softmax(module, "teacher", rolled).double().exp().amax(-1)
    assert torch.allclose(values[rolled.mask].double(), dense[rolled.mask], atol=1e-6)


def keep(rule: StopRule, *rows: list[float], step: int = 100) -> list[int]:
    """What the rule keeps of trajectories at whose steps its signal has these values; NaN: not there."""
    wide = max(len(row) for row in rows)
    values = torch.tensor([row + [float("nan")] * (wide - len(row)) for row in rows])
    module: Any = SimpleNamespace(
        per_step=lambda *_: values, global_step=step, device="cpu", gather=lambda everywhere: everywhere
    )
    rolled: Any = SimpleNamespace(mask=~values.isnan(), length=(~values.isnan()).sum(1))
    kept = rule.keep(module, rolled)
    assert kept is not None
    return kept.tolist()


def low_correction(**settings: Any) -> LowCorrection:
    """Small enough for rows of ten; the quantile is halfway."""
    rule = LowCorrection(**{"window": 2, "skip": 1, "patience": 2, "eta": 0.5, "ready": 3, **settings})
    keep(rule, [1.0] * 10, [1.0] * 10, [1.0] * 10)
    return rule


FALLS = [2.0, 2, 2, 2, 0.1, 0.1, 0.1, 0.1, 2, 2]


def test_a_long_run_of_agreement_is_cut_and_a_short_dip_is_not():
    # windows of two: the first low one is that of steps 5 and 6, the second tells
    assert keep(low_correction(), FALLS, [2.0] * 10) == [4, 10]
    assert keep(low_correction(back_up=False), FALLS) == [7]
    assert keep(low_correction(patience=4), FALLS) == [10]
    assert keep(low_correction(skip=7), FALLS) == [10]
    assert keep(low_correction(), [2.0, 2.0], [0.1]) == [2, 1], "too short for patience, or for a window"


def test_nothing_is_cut_in_warm_up_nor_before_enough_was_seen():
    assert keep(low_correction(), FALLS, step=49) == [10]
    assert keep(low_correction(ready=4), FALLS) == [10]
    assert keep(low_correction(eta=1.0), [1.0] * 10) == [10], "the threshold is the minimum: only a new record is cut"
    assert keep(low_correction(eta=1.0), FALLS) == [4]


def test_the_buffer_forgets():
    rule = low_correction(buffer=3)
    keep(rule, [0.5] * 10, [0.4] * 10)
    assert rule.seen == pytest.approx([1.0, 0.4, 0.4], abs=0.11)


def test_low_correction_warms_up_like_plain_training(tmp_path):
    plain, watched = toy.make_module(), toy.make_module()
    toy.fit(plain, tmp_path / "a")
    toy.fit(watched, tmp_path / "b", [EarlyStopRollout(LowCorrection(window=2))])
    for name, weight in plain.state_dict().items():
        assert torch.equal(watched.state_dict()[name], weight)


@pytest.mark.parametrize(("divergence", "written"), [(0.1, 4), (2.0, 12)])
def test_generation_ends_where_the_teacher_no_longer_corrects(
    divergence, written, tiny_student, tiny_teacher, tmp_path
):
    """In pieces of four: what agrees for long is written no further, and what doesn't is written to its end."""

    class Told(LowCorrection):
        def _threshold(self, module):
            return 1.0

    asked, seen = [], []
    rule = Told(window=2, skip=0, patience=1, ready=1, piece=4)
    rollout = Rollout(batch_size=6, horizon=12)
    module = make_module(tiny_student, tiny_teacher, rollout=rollout)

    def read(self, trajectories, *_):
        asked.append(trajectories.mask.shape[1])
        return torch.where(trajectories.mask, divergence, torch.nan)

    class Sees(toy.L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch.trajectories)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(module), "per_step", read)
        fit(module, tmp_path, callbacks=[EarlyStopRollout(rule), Sees()])
    assert asked == ([4, 4] if written == 4 else [4, 8, 12]), "the last is read for what is trained"
    (batch,) = seen
    assert module.rollout.horizon == 4
    assert int(batch.extent.max()) == (0 if written == 4 else 12) or bool(batch.stopped.any())
    fresh = make_module(tiny_student, tiny_teacher)
    log_probs = log_softmax(fresh, "student", batch).gather(-1, batch.actions[..., None])[..., 0]
    torch.testing.assert_close(batch.behavior_log_probs[batch.mask], log_probs[batch.mask], atol=1e-4, rtol=0)


def test_pieces_need_a_student_that_acts_alone(tiny_student, tiny_teacher, tmp_path):
    with pytest.raises(ValueError, match=r"LowCorrection\.piece=3 is shorter than window=64"):
        LowCorrection(piece=3)
    with pytest.raises(
        ValueError, match=r"LowCorrection\.piece: rollouts are written in pieces in settings that write"
    ):
        toy.fit(toy.make_module(), tmp_path, [EarlyStopRollout(LowCorrection(piece=64))])


# -- all of them --------------------------------------------------------------------------------------------------


POLICIES = {
    "first": lambda: FirstSteps(4),
    "window": lambda: AdaptiveWindow(smallest=2, every=2, agreement=0.9),
    "change": lambda: ChangePoint("log_prob", block=2, fewest=1),
    "low": lambda: LowCorrection(window=2, skip=0, patience=1, ready=8, warmup=1),
}


@pytest.mark.parametrize("name", POLICIES)
def test_it_composes_with_curricula_and_resumes(name, tmp_path):
    """Two optimizer steps per generation batch, so that rollouts are pending in every other checkpoint."""

    def make():
        rollout = Rollout(batch_size=8, micro_batch_size=4, horizon=8)
        module = toy.make_module(objective=Objective([Term(ReverseKL())]), rollout=rollout)
        cools = Curriculum({"rollout.temperature": Linear(1.0, 0.5, 6)})
        fades = Curriculum({"objective.terms.ReverseKL.coefficient": Linear(1.0, 0.5, 6)})
        return module, [cools, EarlyStopRollout(POLICIES[name]()), fades]

    toy.assert_resumes(make, tmp_path)
    module, callbacks = make()
    metrics = toy.fit(module, tmp_path / "again", callbacks, steps=6).callback_metrics
    assert metrics.get("knob/rollout.horizon", 8) < 8 or metrics["train/early_stop/cut"] > 0, "and it does stop some"


@pytest.mark.parametrize("name", POLICIES)
def test_it_works_on_text_beside_another_one(name, make_world, tmp_path):
    world = make_world("text")
    other = EarlyStopRollout(ChangePoint(block=2)) if name in ("first", "window") else EarlyStopRollout(FirstSteps(6))
    module = world.module(rollout=Rollout(batch_size=8, horizon=10), optimizer=sgd())
    trainer = world.fit(module, tmp_path, steps=3, callbacks=[EarlyStopRollout(POLICIES[name]()), other])
    assert 0 < trainer.callback_metrics["train/early_stop/kept"] <= 1
    assert trainer.callback_metrics["knob/rollout.horizon"] <= 10


def test_two_that_set_the_horizon_are_refused(tmp_path):
    both = [EarlyStopRollout(FirstSteps(2)), Curriculum({"rollout.horizon": Linear(2, 6, 3)})]
    with pytest.raises(ValueError, match=r"EarlyStopRollout \(rollout.horizon\) and Curriculum .* turn the same knob"):
        toy.fit(toy.make_module(), tmp_path, both)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FirstSteps(0), r"FirstSteps\.steps must be >= 1"),
        (lambda: AdaptiveWindow(factor=1.0), r"factor=1\.0 > 1"),
        (lambda: ChangePoint(candidates=1), r"candidates=1 >= 2"),
        (lambda: ChangePoint("hunch"), r"margin, confidence or log_prob, not 'hunch'"),  # type: ignore[arg-type]
        (lambda: LowCorrection(eta=2.0), r"eta=2\.0 in \[0, 1\]"),
        (lambda: LowCorrection(buffer=8, ready=9), r"ready=9 could never be reached"),
    ],
)
def test_values_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (ChangePoint(), r"signal=margin needs a vocabulary, which this setting doesn't have; use log_prob"),
        (LowCorrection(teacher="expert"), r"LowCorrection\.teacher: no 'expert' in model\.teachers, which has \['teac"),
    ],
)
def test_what_the_run_does_not_have_is_named(rule, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        toy.fit(toy.make_module(), tmp_path, [EarlyStopRollout(rule)])
