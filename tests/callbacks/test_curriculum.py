"""Knobs over training time: schedules, stages, what is refused, and that a resumed run goes on where it was."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.callbacks import Cosine, Curriculum, Linear, OnPlateau, Piecewise, Stage, Staircase
from opd_lightning.callbacks.knobs import Knob
from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.objective import CrossEntropy, Objective, ReverseKL, Term
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Teacher
from tests.callbacks import toy
from tests.tiny import watch_queries

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


def test_a_staircase_climbs_or_falls_to_its_end():
    assert [Staircase(1, 4, every=2)(step) for step in range(9)] == [1, 1, 2, 2, 3, 3, 4, 4, 4]
    assert [Staircase(5, 0, every=1, by=-2)(step) for step in range(5)] == [5, 3, 1, 0, 0]


def test_on_plateau_waits_for_improvement():
    schedule = OnPlateau("val/accuracy", [8, 16, 32], patience=2, min_delta=0.01)
    seen = []
    for metric in (0.1, 0.2, 0.205, 0.2, 0.3, 0.3, 0.3, 0.1, 0.1, 0.1):
        schedule.watch({"val/accuracy": metric})
        seen.append(schedule(0))
    assert seen == [8, 8, 8, 16, 16, 16, 32, 32, 32, 32]


def test_a_plateau_goes_on_by_what_is_configured_now():
    """A shorter list ends at its last value, and the best of one metric is none of another."""
    before = OnPlateau("val/accuracy", [8, 16, 32], patience=1)
    for value in (0.5, 0.4, 0.4):
        before.watch({"val/accuracy": value})
    shorter, other = OnPlateau("val/accuracy", [8, 16]), OnPlateau("val/length", [8, 16, 32], mode="min")
    for after in (shorter, other):
        after.load_state_dict(before.state_dict())
    assert (shorter(0), shorter.best) == (16, 0.5)
    assert other(0) == 32
    other.watch({"val/length": 7.0})
    assert other.best == -7.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(0, 1, 0), r"Linear: steps must be >= 1"),
        (lambda: Piecewise({3: 1.0}), r"Piecewise\.values needs a value for step 0"),
        (lambda: Piecewise({0: "a", 3: "b"}, interpolate=True), r"only numbers can be interpolated"),
        (lambda: OnPlateau("x", []), r"OnPlateau: values must not be empty"),
        (lambda: Staircase(1, 4, every=1, by=-1), r"by=-1 must lead from 1 to 4"),
        (lambda: Curriculum({}), r"Curriculum has no schedules"),
        (lambda: Curriculum(stages=[Stage({"a": 1}, 2), Stage({"b": 1})]), r"stages\[1\] sets \['b'\], stages\[0\]"),
        (lambda: Curriculum(stages=[Stage({"a": 1}), Stage({"a": 2})]), r"stages\[0\]\.steps must be >= 1, got None"),
        (lambda: Curriculum(stages=[Stage({"a": 1}, 3)]), r"the last stage goes on to the end of the run"),
        (lambda: Curriculum({"a": Linear(0, 1, 2)}, [Stage({"a": 1})]), r"a is in schedules and in stages"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- knobs --------------------------------------------------------------------------------------------------------


def test_knobs_are_found_by_path_and_checked_by_their_owner():
    module = toy.make_module({"teacher": Teacher(EMA(0.1), view=toy.Told())})
    horizon = Knob(module, "rollout.horizon")
    for knob, value in ((horizon, 6.6), (Knob(module, "objective.terms.ReverseKL.coefficient"), 0.5)):
        knob.turn(value)
    Knob(module, "teachers.teacher.weights.rate").turn(0.2)
    assert (module.rollout.horizon, module.objective.terms[0].coefficient) == (7, 0.5)
    assert module.teachers["teacher"].weights.rate == 0.2
    with pytest.raises(ValueError, match=r"rollout\.horizon can't be 0: rollout\.horizon must be >= 1"):
        horizon.turn(0)
    assert horizon.value == 7


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("rollout.length", r"no knob 'rollout\.length': rollout has no 'length'; it has .*horizon"),
        ("teachers.other.rate", r"no knob 'teachers\.other\.rate': teachers has no 'other'; it has teacher"),
        ("rollout.batch_size", r"rollout\.batch_size is read once, when the run begins"),
        ("objective.terms", r"objective\.terms is no knob, but a part of the run, which has 0"),
    ],
)
def test_what_is_no_knob_is_refused(path, message):
    with pytest.raises(ValueError, match=message):
        Knob(toy.make_module(), path)


def test_a_share_makes_the_others_give_way_as_they_were_configured():
    shares = {"student": 0.5, "teacher": 0.3, "dataset": 0.2}
    module = toy.make_module(rollout=Rollout(batch_size=8, behavior=shares))
    teacher = Knob(module, "rollout.behavior.teacher")
    teacher.turn(0.0)
    assert module.rollout.behavior == pytest.approx({"student": 5 / 7, "teacher": 0, "dataset": 2 / 7})
    teacher.turn(0.3)
    assert module.rollout.behavior == pytest.approx(shares)
    assert teacher.overlaps(Knob(module, "rollout.behavior.student"))


@pytest.mark.parametrize("alias", ["objective.terms.0.coefficient", "objective.terms.ReverseKL.coefficient"])
def test_two_callbacks_on_one_knob_are_refused_by_name(alias, tmp_path):
    one = Curriculum({"rollout.horizon": Linear(2, 8, 4), "objective.terms.0.coefficient": Linear(1, 0.5, 4)})
    with pytest.raises(
        ValueError, match=r"Curriculum \(objective.* and Curriculum \(obj.*turn the same knob; keep one"
    ):
        toy.fit(toy.make_module(), tmp_path, [one, Curriculum({alias: Linear(1, 2, 4)})])


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        ({"rollout.horizon": Piecewise({0: 4, 100: 0})}, r"rollout\.horizon can't be 0"),
        ({"objective.terms.3.coefficient": Linear(0, 1, 5)}, r"objective\.terms has no '3'; it has 0"),
        ({"rollout.behavior": Piecewise({0: {"student": 1.0}, 9: {"expert": 1.0}})}, r"names 'expert', which is no"),
    ],
)
def test_what_a_later_stage_could_not_do_is_refused_before_training(schedules, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        toy.fit(toy.make_module(), tmp_path, [Curriculum(schedules)])


# -- in training --------------------------------------------------------------------------------------------------


def test_a_growing_horizon_stops_generation_and_is_logged(world, tmp_path):
    seen = []

    class Watching(world.setting):
        def training_step(self, batch, batch_idx):
            seen.append((batch.trajectories.mask.shape[1], self.trainer.callback_metrics.get("knob/rollout.horizon")))
            return super().training_step(batch, batch_idx)

    module = world.module(setting=Watching, rollout=Rollout(batch_size=8, horizon=20))
    world.fit(module, tmp_path, steps=5, callbacks=[Curriculum({"rollout.horizon": Linear(2, 8, 3)})])
    widths = [width for width, _ in seen]
    assert widths[:3] == [2, 4, 6]
    assert max(widths[3:]) <= 8
    assert [int(value) for _, value in seen[1:]] == [2, 4, 6, 8]


def test_off_after_a_step_skips_the_teacher(world, tmp_path, monkeypatch):
    asked = []
    watch_queries(monkeypatch, lambda *_: asked.append(module.global_step))

    class Watching(world.setting):
        def on_train_start(self):
            super().on_train_start()
            asked.clear()  # by the comparison before the first step

    objective = Objective([Term(ReverseKL()), Term(CrossEntropy(), teacher=None)])
    module = world.module(objective=objective, setting=Watching)
    off = Curriculum({"objective.terms.0.coefficient": Piecewise({0: 1.0, 2: 0.0})})
    world.fit(module, tmp_path, steps=4, callbacks=[off])
    assert asked == [0, 1]


def test_stages_give_way_to_one_another_in_the_text_setting(make_world, tmp_path):
    """Given completions first, then the student's own; the horizon grows meanwhile."""
    seen = []
    world = make_world("text")

    class Watching(world.setting):
        def training_step(self, batch, batch_idx):
            acted = batch.trajectories
            seen.append({acted.sources[i] for i in acted.source})
            return super().training_step(batch, batch_idx)

    stages = [Stage({"rollout.behavior": {"dataset": 1.0}}, steps=2), Stage({"rollout.behavior": {"student": 1.0}})]
    grows = Curriculum({"rollout.horizon": Linear(3, 9, 6), "rollout.temperature": Cosine(1.0, 0.7, 5)})
    module = world.module(setting=Watching)
    trainer = world.fit(module, tmp_path, steps=4, callbacks=[Curriculum(stages=stages), grows])
    assert seen == [{"dataset"}, {"dataset"}, {"student"}, {"student"}]
    assert trainer.callback_metrics["curriculum/stage"] == 2


def test_stages_compose_with_other_callbacks_and_resume_where_they_were(tmp_path):
    def make():
        rollout = Rollout(batch_size=8, micro_batch_size=4, horizon=6, behavior={"teacher": 1.0})
        module = toy.make_module({"teacher": Teacher(EMA(0.1), view=toy.Told())}, rollout=rollout)
        stages = [
            Stage({"rollout.behavior": {"teacher": 1.0}, "teachers.teacher.weights.rate": 0.0}, steps=3),
            Stage({"rollout.behavior": {"student": 1.0}, "teachers.teacher.weights.rate": 0.2}),
        ]
        grows = Curriculum({"rollout.horizon": Linear(3, 9, 6), "rollout.temperature": Cosine(1.0, 0.7, 5)})
        fades = Curriculum({"teachers.teacher.view.strength": Staircase(1, 0, every=2, by=-0.5)})
        return module, [Curriculum(stages=stages), grows, fades]

    toy.assert_resumes(make, tmp_path)


def test_on_plateau_reads_the_logged_metric_and_resumes_in_its_place(tmp_path):
    made = []

    def make():
        schedule = OnPlateau("val/length", [4, 6, 8], patience=1, min_delta=1e9)
        made.append(toy.make_module(evaluation=Evaluation(before=False, horizon=3)))
        return made[-1], [Curriculum({"rollout.horizon": schedule})]

    toy.assert_resumes(make, tmp_path, steps=3, validation=toy.make_rows(4))
    assert made[0].rollout.horizon == 8, "the first validation is the best so far, each later one is waited for in vain"


def test_a_metric_that_nobody_logs_is_named(tmp_path):
    missing = Curriculum({"rollout.horizon": OnPlateau("val/nothing", [4, 6])})
    with pytest.raises(ValueError, match=r"OnPlateau\.monitor: nothing logs 'val/nothing'; there are .*val/length"):
        toy.fit(toy.make_module(), tmp_path, [missing], validation=toy.make_rows(4))
