"""What a callback of its own may do: follow optimizer steps, ask, act, and provide what parts need."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import jsonargparse
import lightning as L
import pytest
import torch
import yaml

from opd_lightning import callbacks
from opd_lightning.callbacks import ChangePoint, DistillationCallback, EarlyStopRollout
from opd_lightning.objective import CrossEntropy, Objective, ReverseKL, Term, Weight
from opd_lightning.rollout_settings import Rollout, derived_seed
from opd_lightning.teacher import Frozen, Teacher
from tests.callbacks import toy
from tests.tiny import LongerIsBetter


class Told(DistillationCallback):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, int, int]] = []

    def check(self, module):
        self.notes.append(("check", module.global_step, 0))

    def on_optimizer_step_start(self, module, step):
        self.notes.append(("start", module.global_step, len(step)))

    def on_optimizer_step_end(self, module, step):
        self.notes.append(("end", module.global_step, len(step)))


def test_a_callback_is_told_of_optimizer_steps_whatever_their_micro_batches(tmp_path):
    told = Told()
    module = toy.make_module(rollout=Rollout(batch_size=8, micro_batch_size=2, horizon=6))
    toy.fit(module, tmp_path, [told], steps=2, accumulate_grad_batches=2)
    assert told.notes == [("check", 0, 0), ("start", 0, 2), ("end", 1, 2), ("start", 1, 2), ("end", 2, 2)]


# -- acting -------------------------------------------------------------------------------------------------------


class LikeliestToTeacher(DistillationCallback):
    """BRTS (2605.09725), roughly: where a whole group fails, the teacher's rollout takes the place of its first."""

    sources = frozenset({"teacher"})
    remembers = ("put",)

    def __init__(self) -> None:
        self.put = 0

    def on_rollouts(self, module, trajectories):
        index = torch.arange(0, len(trajectories), module.rollout.group_size)
        index = index[trajectories.group_mean[index] < 1]
        self.put += len(index)
        if not len(index):
            return trajectories
        seeds = [derived_seed(int(seed), 1) for seed in trajectories.seed[index]]
        acted = module.act("teacher", [trajectories.examples[i] for i in index], seeds)
        return trajectories.put(index, acted.to("cpu"), module.padding)


def brts() -> tuple[Any, list[Any]]:
    terms = [Term(ReverseKL(), source="student"), Term(CrossEntropy(), teacher=None, source="teacher")]
    rollout = Rollout(batch_size=4, group_size=2, micro_batch_size=4, horizon=6)
    module = toy.make_module(
        {"teacher": Teacher(Frozen(toy.Pretrained("1")))}, Objective(terms), rollout=rollout, reward=LongerIsBetter()
    )
    return module, [LikeliestToTeacher()]


def test_a_teacher_acts_where_a_callback_says_so(tmp_path):
    """Refused today: nobody called 'teacher' acts by ``rollout.behavior``."""
    module, callbacks = brts()
    seen = []

    class Sees(DistillationCallback):
        def on_optimizer_step_start(self, module, step):
            seen.extend(step.trajectories)

    trainer = toy.fit(module, tmp_path, [*callbacks, Sees()])
    assert callbacks[0].put > 0
    theirs = [names(batch).count("teacher") for batch in seen]
    assert sum(theirs) == callbacks[0].put
    assert all(batch.reward is not None and not batch.group_std.isnan().any() for batch in seen), "judged again"
    assert trainer.callback_metrics["train/loss/CrossEntropy"] != 0
    with pytest.raises(ValueError, match=r"\.source: nobody called 'teacher' acts"):
        toy.fit(brts()[0], tmp_path / "without")


def names(batch: Any) -> list[str]:
    return [batch.sources[int(i)] for i in batch.source]


def test_acting_callbacks_resume(tmp_path):
    toy.assert_resumes(brts, tmp_path)


def test_a_teacher_that_is_not_there_is_named(tmp_path):
    class Asks(DistillationCallback):
        asks = frozenset({"judge"})

    with pytest.raises(ValueError, match=r"Asks: no 'judge' in model\.teachers, which has \['teacher'\]"):
        toy.fit(toy.make_module(), tmp_path, [Asks()])


# -- asking and providing -----------------------------------------------------------------------------------------


def two_teachers() -> Any:
    teachers = {name: Teacher(Frozen(toy.Pretrained(str(seed)))) for name, seed in (("teacher", 1), ("guard", 2))}
    return toy.make_module(teachers)


def test_a_teacher_may_be_asked_by_a_callback_alone(tmp_path):
    toy.fit(two_teachers(), tmp_path, [EarlyStopRollout(ChangePoint("log_prob", block=2, fewest=1, teacher="guard"))])
    with pytest.raises(ValueError, match=r"nobody asks \['guard'\]"):
        toy.fit(two_teachers(), tmp_path / "idle")


class Votes(Weight):
    """Reads a channel."""

    needs = frozenset({"votes"})
    scope = "data"

    def __call__(self, steps):
        return steps.channel("votes").float()


class FillsVotes(DistillationCallback):
    provides = frozenset({"votes"})

    def on_rollouts(self, module, trajectories):
        votes = torch.zeros_like(trajectories.mask)
        votes[:, 0] = True
        return dataclasses.replace(trajectories, channels={**trajectories.channels, "votes": votes})


def test_a_callback_may_provide_what_a_part_needs(tmp_path):
    def make() -> Any:
        return toy.make_module(objective=Objective([Term(ReverseKL(), weights=[Votes()])]))

    toy.fit(make(), tmp_path, [FillsVotes()])
    with pytest.raises(ValueError, match="Votes needs 'votes'"):
        toy.fit(make(), tmp_path / "without")


# -- groups of several policies -----------------------------------------------------------------------------------


def test_groups_of_several_policies_resume(tmp_path):
    def make() -> tuple[Any, list[Any]]:
        terms = [Term(ReverseKL(), source="student"), Term(CrossEntropy(), teacher=None, source="teacher")]
        rollout = Rollout(batch_size=4, members={"student": 3, "teacher": 1}, micro_batch_size=4, horizon=6)
        return toy.make_module(objective=Objective(terms), rollout=rollout), []

    toy.assert_resumes(make, tmp_path, steps=4)


# -- what ships -----------------------------------------------------------------------------------------------------

CLASSES = [getattr(callbacks, name) for name in callbacks.__all__]
SHIPPED = [made for made in CLASSES if issubclass(made, DistillationCallback) and "Example::" in (made.__doc__ or "")]


def test_every_callback_that_ships_has_an_example():
    bases = {DistillationCallback, callbacks.KnobCallback}
    assert set(SHIPPED) == {made for made in CLASSES if issubclass(made, DistillationCallback)} - bases


@pytest.mark.parametrize("made", SHIPPED)
def test_the_example_of_a_callback_is_one(made):
    (text,) = re.findall(r"Example::\n\n(.*?)\n\n", inspect.cleandoc(made.__doc__), re.DOTALL)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[L.Callback])
    read = parser.parse_object({"callbacks": yaml.safe_load(text)["callbacks+"]})
    (built,) = parser.instantiate_classes(read).callbacks
    assert type(built) is made
