"""Prefixes that a teacher writes, and plans that hard groups are shown."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.callbacks import Staircase
from opd_lightning.callbacks.curriculum import Piecewise
from opd_lightning.methods.prefixes import ByAuthor, GuideHardGroups, TeacherPrefix
from opd_lightning.methods.weight import Accepted
from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.objective import (
    CrossEntropy,
    ForwardKL,
    GroupRelative,
    LogRatio,
    Objective,
    PolicyGradient,
    Support,
    Term,
)
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Live, Teacher
from tests import tiny
from tests.methods.test_rollouts import Sees
from tests.methods.world import World
from tests.objective.reference import close
from tests.tiny import act, teacher_forced

K1 = [Term(PolicyGradient(LogRatio(), clip=None, ratio="none"), weights=[ByAuthor()])]


def prefixed(student, teacher, folder, length, terms=None, steps=1, callbacks=True):
    rollout = Rollout(batch_size=6, horizon=8, behavior={"teacher": 1.0, "student": 0.0})
    module = tiny.make_module(student, teacher, Objective(terms or K1), rollout=rollout)
    sees = Sees()
    tiny.fit(module, folder, callbacks=[TeacherPrefix(length), sees] if callbacks else [sees], steps=steps)
    return module, sees.batches


def test_the_teacher_writes_the_beginning_and_the_student_goes_on(tiny_student, tiny_teacher, tmp_path):
    module, (batch,) = prefixed(tiny_student, tiny_teacher, tmp_path, Piecewise({0: 3}))
    author = batch.channels["author"].bool()
    assert int(author.sum(1).max()) == 3
    assert not (author & ~batch.mask).any()
    assert (batch.mask & ~author).any()
    whole = author.sum(1) == batch.length
    assert bool(batch.stopped[whole].all()), "where the teacher has ended by itself the rollout is its own"
    again = act(module, batch.examples, horizon=3)
    assert module.rollout.horizon == 3
    assert again.mask.shape[1] <= 3
    assert module.evaluation.horizon == 8


def test_log_probs_are_those_of_whoever_wrote(tiny_student, tiny_teacher, tmp_path):
    _, (batch,) = prefixed(tiny_student, tiny_teacher, tmp_path, Piecewise({0: 3}))
    fresh = tiny.make_module(tiny_student, tiny_teacher)
    author = batch.channels["author"].bool()
    for name, own in (("teacher", author), ("student", ~author)):
        replayed = teacher_forced(fresh, name, batch)
        here = batch.mask & own
        torch.testing.assert_close(batch.behavior_log_probs[here], replayed[here], atol=1e-4, rtol=0)


def test_without_a_prefix_it_is_the_student_alone(tiny_student, tiny_teacher, tmp_path):
    ours, (batch,) = prefixed(tiny_student, tiny_teacher, tmp_path / "a", Piecewise({0: 0}))
    rollout = Rollout(batch_size=6, horizon=8)
    plain = tiny.make_module(
        tiny_student,
        tiny_teacher,
        Objective([Term(PolicyGradient(LogRatio(), clip=None, ratio="none"))]),
        rollout=rollout,
    )
    tiny.fit(plain, tmp_path / "b", steps=1)
    assert not batch.channels["author"].any()
    for one, other in zip(ours.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_prefix_becomes_shorter(tiny_student, tiny_teacher, tmp_path):
    _, batches = prefixed(tiny_student, tiny_teacher, tmp_path, Staircase(8, 0, every=1, by=-4), steps=3)
    longest = [int(batch.channels["author"].sum(1).max()) for batch in batches]
    assert longest[1:] == [4, 0]
    assert 4 < longest[0] <= 8


def test_who_acts_has_to_be_named(tiny_student, tiny_teacher, tmp_path):
    module = tiny.make_module(tiny_student, tiny_teacher, Objective(K1), rollout=Rollout(batch_size=4))
    with pytest.raises(ValueError, match=r"TeacherPrefix: rollout\.behavior has to name teacher and student"):
        tiny.fit(module, tmp_path, callbacks=[TeacherPrefix(Piecewise({0: 3}))])


def test_the_three_terms_of_tropd():
    """Against the sum over steps: M by the draws that both terms share, and β on the teacher's own steps."""
    world = World(2)
    terms = [
        Term(PolicyGradient(LogRatio(), clip=None, ratio="none"), weights=[Accepted(), ByAuthor()], name="near"),
        Term(
            ForwardKL(support=Support(of="teacher", k=3, remainder="drop")),
            weights=[Accepted(complement=True), ByAuthor()],
            name="far",
        ),
        Term(CrossEntropy(), teacher=None, weights=[ByAuthor(teacher=True)], coefficient=0.01, name="prefix"),
    ]
    accepted = world.values(Accepted())
    log_p, log_q = world.log_probs(world.student), world.log_probs(world.teachers["teacher"]).detach()
    top = log_q.topk(3).indices
    q, ratio = log_q.gather(-1, top).exp(), log_q.gather(-1, top) - log_p.gather(-1, top)
    own = world.log_prob(world.student)
    by_teacher = world.trajectories.channels["author"].double()
    loss = (
        torch.where(accepted == 1, -world.delta * own, (q * ratio).sum(-1)) * (1 - by_teacher) - 0.01 * by_teacher * own
    )
    for ours, formula in zip(
        world.gradients(*terms), world.student.gradients(loss[world.mask].sum() / world.mask.sum()), strict=True
    ):
        close(ours, formula, 1e-6)


# -- plans -----------------------------------------------------------------------------------------------------------


class Guided(GuideHardGroups):
    """Succeeds with ``enough`` actions, whatever is written; notes what was tried."""

    def __init__(self, enough: int, **settings) -> None:
        super().__init__(column="solution", separator="+", **settings)
        self.enough, self.tried = enough, []

    def _acted(self, module, trajectories, rows, lengths, draw):
        acted = super()._acted(module, trajectories, rows, lengths, draw)
        self.tried.append((rows, lengths))
        module.success = [length >= self.enough for length in lengths]
        return acted


ROWS = [{"prompt": f"{i}+{i}=", "answer": "x", "solution": "1+2+3+4+5+6"} for i in range(4)]


def guiding(student, folder, enough, reward=0.0, callback=True, steps=1):
    teachers = {"guided": Teacher(Live(), view=PromptView("{{ solution }}?{{ prompt }}"))}
    terms = [Term(PolicyGradient(GroupRelative()), teacher=None)]
    module = tiny.make_module(
        student,
        teachers,
        Objective(terms),
        rollout=Rollout(batch_size=4, group_size=2, horizon=5),
        reward=tiny.LongerIsBetter(),
    )
    module.success = None
    guide, sees = Guided(enough), Sees()

    def rewards(trajectories):
        success = module.success
        module.success = None
        if success is None or len(success) != len(trajectories):
            return [reward] * len(trajectories), [{} for _ in trajectories.examples]
        return [float(one) for one in success], [{} for _ in trajectories.examples]

    module.rewards = rewards
    tiny.fit(module, folder, rows=ROWS, callbacks=[guide, sees] if callback else [sees], steps=steps)
    return module, guide, sees.batches


@pytest.mark.parametrize("enough", [0, 1, 3, 6])
def test_the_fewest_actions_that_help_are_found(enough, tiny_student, tmp_path):
    """Of six: five rounds are enough for any number of them."""
    _, guide, (batch,) = guiding(tiny_student, tmp_path, enough)
    rows, lengths = guide.tried[-1]
    assert rows == list(range(8)), "the groups are rolled out again as a whole"
    assert lengths == [enough] * 8
    assert all(example["solution"] == "1+2+3+4+5+6" for example in batch.examples), "rows are as they were"
    assert {batch.sources[i] for i in batch.source} == {"guided"}


def test_ratios_have_the_log_probs_of_acting_with_the_plan(tiny_student, tmp_path):
    _, _, (batch,) = guiding(tiny_student, tmp_path, 3)
    view = PromptView("{{ solution }}?{{ prompt }}")
    fresh = tiny.make_module(tiny_student, {}, tiny.no_teacher())
    student = fresh.collate(batch.examples, fresh.policies["student"])
    assert torch.equal(batch.observation["input_ids"], student["input_ids"]), "what is trained on is the plain prompt"
    shown = [view(example | {"solution": "1+2+3"}) for example in batch.examples]
    guided = teacher_forced(fresh, "student", batch, shown)
    torch.testing.assert_close(batch.behavior_log_probs[batch.mask], guided[batch.mask], atol=1e-4, rtol=0)
    assert not torch.allclose(teacher_forced(fresh, "student", batch)[batch.mask], guided[batch.mask], atol=1e-3)


def test_no_hard_group_no_further_rollout(tiny_student, tmp_path):
    ours, guide, _ = guiding(tiny_student, tmp_path / "a", 3, reward=1.0)
    plain, _, _ = guiding(tiny_student, tmp_path / "b", 3, reward=1.0, callback=False)
    assert not guide.tried
    for one, other in zip(ours.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rows_without_a_plan_and_runs_without_rewards(tiny_student, tiny_teacher, tmp_path):
    guide = GuideHardGroups()
    assert guide.plan({"actions": ["a", "b"]}) == ["a", "b"]
    assert guide.plan({"actions": "a\nb"}) == ["a", "b"]
    assert guide.plan({"actions": ""}) == guide.plan({}) == []
    assert guide.shortened({"actions": ["a", "b"], "x": 1}, 1) == {"actions": ["a"], "x": 1}
    with pytest.raises(ValueError, match="GuideHardGroups looks at the rewards of groups"):
        tiny.fit(tiny.make_module(tiny_student, tiny_teacher), tmp_path, callbacks=[guide])
