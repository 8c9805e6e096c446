"""Teachers that follow: when they move, when they must not, and that a resumed run moves them alike."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from opd_lightning.callbacks import (
    Average,
    Curriculum,
    EarlyStopRollout,
    Every,
    FirstSteps,
    Linear,
    Never,
    Piecewise,
    SyncRule,
    TeacherSync,
    WhenConsolidated,
)
from opd_lightning.pretrained import Lora
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Live, Teacher
from tests.callbacks import toy
from tests.tiny import LongerIsBetter, log_softmax

GREEDY = {"rest": 1, "window": 1, "every": 1, "gain": -10.0, "longest": 100.0}


class Compares(L.Callback):
    """After every optimizer step: how the teacher lies to the student and to where both began."""

    def __init__(self) -> None:
        self.is_student: list[bool] = []
        self.is_first: list[bool] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.first = self.weights(pl_module.student)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        teacher = self.weights(pl_module.policies["teacher"].model)
        self.is_student.append(torch.equal(teacher, self.weights(pl_module.student)))
        self.is_first.append(torch.equal(teacher, self.first))

    @staticmethod
    def weights(model: torch.nn.Module) -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def make(**settings: Any) -> Any:
    return toy.make_module({"teacher": Teacher(EMA(0.3), view=toy.Told())}, reward=LongerIsBetter(), **settings)


def run(folder: Path, rule: SyncRule, steps: int = 6) -> tuple[Compares, Any]:
    compares = Compares()
    trainer = toy.fit(make(), folder, [TeacherSync(rule), compares], steps=steps)
    return compares, trainer.callback_metrics


def test_it_moves_when_it_is_told_to(tmp_path):
    assert run(tmp_path / "never", Never())[0].is_first == [True] * 6
    moved, logged = run(tmp_path / "every", Every(2))
    assert moved.is_student == [False, True, False, True, False, True]
    assert moved.is_first == [True] + [False] * 5
    assert logged["train/teacher_sync/syncs"] == 1
    assert logged["knob/teachers.teacher.weights.rate"] == 0


def test_an_average_follows_its_schedule(tmp_path):
    moved, logged = run(tmp_path, Average(Piecewise({0: 0.0, 2: 1.0, 4: 0.0})))
    assert moved.is_first[:2] == [True, True]
    assert moved.is_student == [False, False, True, True, False, False]
    assert logged["knob/teachers.teacher.weights.rate"] == 0


def test_consolidation_is_asked_for(tmp_path):
    assert run(tmp_path / "open", WhenConsolidated(**GREEDY))[0].is_student == [True] * 6, "all gates are open"
    for gate in ({"gain": float("inf")}, {"rest": 7}, {"every": 7}, {"window": 7}):
        rule = WhenConsolidated(**{**GREEDY, **gate})
        assert run(tmp_path / str(gate), rule)[0].is_first == [True] * 6, gate
    assert run(tmp_path / "rest", WhenConsolidated(**{**GREEDY, "rest": 3}))[0].is_student == [False, False, True] * 2


@pytest.mark.parametrize(("lengths", "moves"), [([4, 4, 4], True), ([2, 2, 8], True), ([1, 1, 10], False)])
def test_a_few_trajectories_that_grow_too_long_hold_it_back(lengths, moves):
    module: Any = SimpleNamespace(gather=lambda values: values, global_step=30, device="cpu")
    step: Any = SimpleNamespace(trajectories=[SimpleNamespace(reward=torch.ones(3), length=torch.tensor(lengths))])
    rule = WhenConsolidated(window=1, gain=-1.0, longest=2.0)
    assert rule.observe(module, step) == moves


def test_the_reference_only_rises(tmp_path):
    seen = []
    rule = WhenConsolidated(**{**GREEDY, "gain": 0.0})

    class Notes(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            seen.append(rule.reference)

    trainer = toy.fit(make(), tmp_path, [TeacherSync(rule), Notes()], steps=20)
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]
    assert "train/reward" in trainer.callback_metrics


@pytest.mark.parametrize(
    "rule",
    [
        lambda: Average(Linear(0.5, 0.0, 5)),
        lambda: Every(2),
        lambda: WhenConsolidated(rest=2, window=2, every=1, gain=-0.5, longest=10),
    ],
)
def test_it_composes_and_resumes(rule, tmp_path):
    def again():
        others = [EarlyStopRollout(FirstSteps(4)), Curriculum({"teachers.teacher.view.strength": Linear(2, 0, 5)})]
        module = make(rollout=Rollout(batch_size=8, micro_batch_size=4, horizon=6))
        return module, [TeacherSync(rule()), *others]

    toy.assert_resumes(again, tmp_path)


@pytest.mark.parametrize("lora", [None, Lora(r=2)])
def test_it_works_on_text_also_with_adapters(lora, make_world, tmp_path):
    world = make_world("text")
    teachers = {"teacher": Teacher(EMA(0.5), view=world.view)}
    module = world.module(teachers, lora=lora)
    world.fit(module, tmp_path, steps=3, callbacks=[TeacherSync(Every(3)), EarlyStopRollout(FirstSteps(6))])
    rolled = module.act("student", world.make_rows(4), [0, 1, 2, 3])
    student, teacher = (log_softmax(module, who, rolled) for who in ("student", "teacher"))
    assert torch.allclose(student[rolled.mask], teacher[rolled.mask], atol=1e-4)


def test_what_cannot_move_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"teacher's weights are Frozen, which never move; use EMA"):
        toy.fit(toy.make_module(), tmp_path, [TeacherSync(Never())])
    with pytest.raises(ValueError, match=r"teacher's weights are Live"):
        toy.fit(toy.make_module({"teacher": Teacher(Live(), view=toy.Told())}), tmp_path, [TeacherSync(Never())])
    with pytest.raises(ValueError, match=r"no knob 'teachers\.other\.weights\.rate': teachers has no 'other'"):
        toy.fit(make(), tmp_path, [TeacherSync(Never(), teacher="other")])
    module = make()
    module.reward = None
    with pytest.raises(ValueError, match=r"WhenConsolidated reads rewards; set model\.reward"):
        toy.fit(module, tmp_path, [TeacherSync(WhenConsolidated())])
    twice = [TeacherSync(Never()), Curriculum({"teachers.teacher.weights.rate": Linear(0, 1, 5)})]
    with pytest.raises(ValueError, match=r"TeacherSync .* and Curriculum .* turn the same knob"):
        toy.fit(make(), tmp_path, twice)
    with pytest.raises(ValueError, match=r"Every\.steps must be >= 1"):
        Every(0)
    with pytest.raises(ValueError, match=r"rest=0.* must be >= 1"):
        WhenConsolidated(rest=0)
