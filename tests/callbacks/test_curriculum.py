"""Knobs over training time: schedules, stages, what is refused, and that a resumed run goes on where it was."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.callbacks import Cosine, Curriculum, Linear, OnPlateau, Piecewise
from opd_lightning.callbacks.knobs import read, turn
from opd_lightning.objective import CrossEntropy, Objective, ReverseKL, Term
from opd_lightning.rollout import Rollout
from opd_lightning.teacher import EMA, Teacher
from tests.tiny import Rows, make_trainer

# -- schedules ----------------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from([Linear, Cosine]),
    start=st.floats(-5, 5),
    end=st.floats(-5, 5),
    steps=st.integers(1, 50),
    wait=st.integers(0, 20),
)
def test_ramps_begin_and_end_where_they_say_and_never_turn_back(kind, start, end, steps, wait):
    values = [kind(start, end, steps, wait)(step) for step in range(wait + steps + 5)]
    assert values[: wait + 1] == [start] * (wait + 1)
    assert values[wait + steps :] == pytest.approx([end] * 5)
    signs = [(b - a) * (end - start) for a, b in pairwise(values)]
    assert all(sign >= -1e-9 for sign in signs)
    if steps % 2 == 0:
        assert values[wait + steps // 2] == pytest.approx((start + end) / 2)


def test_piecewise_jumps_or_draws_lines():
    steps = Piecewise({4: 1.0, 0: 0.0, 6: 5.0})
    assert [steps(step) for step in range(8)] == [0, 0, 0, 0, 1, 1, 5, 5]
    lines = Piecewise({0: 0.0, 4: 1.0, 6: 5.0}, interpolate=True)
    assert [lines(step) for step in range(8)] == [0, 0.25, 0.5, 0.75, 1, 3, 5, 5]
    assert Piecewise({0: {"student": 1.0}})(3) == {"student": 1.0}


def test_on_plateau_waits_for_improvement():
    schedule = OnPlateau("val/accuracy", [8, 16, 32], patience=2, min_delta=0.01)
    seen = []
    for metric in (0.1, 0.2, 0.205, 0.2, 0.3, 0.3, 0.3, 0.1, 0.1, 0.1):
        schedule.see(metric)
        seen.append(schedule(0))
    assert seen == [8, 8, 8, 16, 16, 16, 32, 32, 32, 32]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(0, 1, 0), r"Linear: steps must be >= 1"),
        (lambda: Piecewise({3: 1.0}), r"Piecewise\.values needs a value for step 0"),
        (lambda: Piecewise({0: "a", 3: "b"}, interpolate=True), r"only numbers can be interpolated"),
        (lambda: OnPlateau("x", []), r"OnPlateau: values must not be empty"),
        (lambda: Curriculum({}), r"Curriculum\.schedules is empty"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- knobs --------------------------------------------------------------------------------------------------------


def test_knobs_are_found_by_path_and_checked_by_their_owner(world):
    module = world.module({"teacher": Teacher(EMA(0.1))}, rollout=Rollout(batch_size=8, horizon=10))
    turn(module, "rollout.horizon", 6.6)
    turn(module, "objective.terms.0.coefficient", 0.5)
    turn(module, "teachers.teacher.weights.rate", 0.2)
    assert (module.rollout.horizon, module.objective.terms[0].coefficient) == (7, 0.5)
    assert module.teachers["teacher"].weights.rate == 0.2
    with pytest.raises(ValueError, match=r"rollout\.horizon can't be 0: rollout\.horizon must be >= 1"):
        turn(module, "rollout.horizon", 0)
    assert read(module, "rollout.horizon") == 7
    with pytest.raises(ValueError, match=r"no knob 'rollout\.length': rollout has no 'length'; it has .*horizon"):
        read(module, "rollout.length")
    with pytest.raises(ValueError, match=r"no knob 'teachers\.other\.rate': teachers has no 'other'; it has teacher"):
        read(module, "teachers.other.rate")


def test_two_callbacks_on_one_knob_are_refused_by_name(world, tmp_path):
    one = Curriculum({"rollout.horizon": Linear(2, 8, 4), "rollout.temperature": Linear(1, 0.5, 4)})
    callbacks = [one, Curriculum({"rollout.horizon": Linear(2, 4, 4)})]
    with pytest.raises(ValueError, match=r"Curriculum and Curriculum both turn rollout\.horizon; keep one of them"):
        world.fit(world.module(), tmp_path, callbacks=callbacks)


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        ({"rollout.horizon": Piecewise({0: 4, 100: 0})}, r"rollout\.horizon can't be 0"),
        ({"objective.terms.3.coefficient": Linear(0, 1, 5)}, r"objective\.terms has no '3'; it has 0"),
        ({"rollout.behaviour": Piecewise({0: {"student": 1.0}, 9: {"expert": 1.0}})}, r"names 'expert', which is no"),
    ],
)
def test_what_a_later_stage_could_not_do_is_refused_before_training(world, schedules, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        world.fit(world.module(), tmp_path, callbacks=[Curriculum(schedules)])


# -- in training --------------------------------------------------------------------------------------------------


def test_a_growing_horizon_stops_generation_and_is_logged(world, tmp_path):
    seen = []

    class Watching(world.setting):
        def training_step(self, batch, batch_idx):
            seen.append((batch.mask.shape[1], self.trainer.callback_metrics.get("knob/rollout.horizon")))
            return super().training_step(batch, batch_idx)

    module = world.module(setting=Watching, rollout=Rollout(batch_size=8, horizon=20))
    world.fit(module, tmp_path, steps=5, callbacks=[Curriculum({"rollout.horizon": Linear(2, 8, 3)})])
    widths = [width for width, _ in seen]
    assert widths[:3] == [2, 4, 6]
    assert max(widths[3:]) <= 8
    assert [int(value) for _, value in seen[1:]] == [4, 6, 8, 8]


def test_off_after_a_step_skips_the_teacher(world, tmp_path):
    asked = []

    class Watching(world.setting):
        def ask(self, name, trajectories):
            asked.append(self.global_step)
            return super().ask(name, trajectories)

    objective = Objective([Term(ReverseKL()), Term(CrossEntropy(), teacher=None)])
    module = world.module(objective=objective, setting=Watching)
    off = Curriculum({"objective.terms.0.coefficient": Piecewise({0: 1.0, 2: 0.0})})
    world.fit(module, tmp_path, steps=4, callbacks=[off])
    assert asked == [0, 1]


def test_stages_compose_with_another_callback_and_resume_where_they_were(world, tmp_path):
    """Given completions first, then the student's own; the horizon grows meanwhile. Stopped in mid-way and resumed."""

    def run(folder, steps, checkpoint=None):
        module = world.module(rollout=Rollout(batch_size=8, horizon=10, behaviour={"dataset": 1.0}))
        stages = Curriculum({"rollout.behaviour": Piecewise({0: {"dataset": 1.0}, 2: {"student": 1.0}})})
        grows = Curriculum({"rollout.horizon": Linear(3, 9, 6), "rollout.temperature": Cosine(1.0, 0.7, 5)})
        trainer = make_trainer(folder, steps=steps, callbacks=[stages, grows])
        trainer.fit(module, datamodule=Rows(world.make_rows(24)), ckpt_path=checkpoint, weights_only=True)
        return trainer, module

    _, unbroken = run(tmp_path / "whole", 6)
    trainer, _ = run(tmp_path / "half", 3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = run(tmp_path / "rest", 6, tmp_path / "half.ckpt")
    for mine, theirs in zip(resumed.student.parameters(), unbroken.student.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_on_plateau_reads_the_logged_metric_and_keeps_its_place(world, tmp_path):
    rows = world.make_rows(24)
    schedule = OnPlateau("val/length", [4, 6, 8], patience=1, min_delta=1e9)
    curriculum = Curriculum({"rollout.horizon": schedule})
    module = world.module(rollout=Rollout(batch_size=8, horizon=10))
    world.fit(
        module,
        tmp_path,
        rows,
        steps=3,
        validation=rows[:4],
        val_check_interval=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        callbacks=[curriculum],
    )
    assert module.rollout.horizon == 8, "the first validation is the best so far, each later one is waited for in vain"
    again = Curriculum({"rollout.horizon": OnPlateau("val/length", [4, 6, 8], patience=1, min_delta=1e9)})
    again.load_state_dict(curriculum.state_dict())
    assert again.schedules["rollout.horizon"](0) == 8

    missing = Curriculum({"rollout.horizon": OnPlateau("val/nothing", [4, 6])})
    with pytest.raises(ValueError, match=r"OnPlateau\.monitor: nothing logs 'val/nothing'; there are .*val/length"):
        world.fit(
            world.module(), tmp_path, rows, validation=rows[:4], val_check_interval=1, check_val_every_n_epoch=None,
            callbacks=[missing],
        )  # fmt: skip
