"""What is logged: averages that add up over chunks, micro-batches and ranks, and the numbers themselves."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.diagnostics import Averages, Stopwatch
from opd_lightning.distribution import Gaussian, Stream
from opd_lightning.metrics import over_ranks
from opd_lightning.objective import Objective, ReverseKL, Term, diagnostics
from opd_lightning.ranks import Ranks
from tests.objective.reference import Policy, batch, examples

V = 6
MASK = [[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0]]
SHAPE = (3, 4)


def test_averages_weigh_by_their_counts():
    averages = Averages()
    averages.add("a", torch.tensor([1.0, 2.0, 6.0]))
    averages.add("a", 7.0)
    averages.add("b", torch.tensor([4.0, 0.0]), torch.tensor([2.0, 0.0]))
    averages.add("nothing", torch.zeros(2), torch.zeros(2))
    assert averages.compute() == {"a": 4.0, "b": 2.0}
    assert Averages().compute() == {}


@examples(25)
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), cut=st.integers(0, 8))
def test_merging_parts_equals_averaging_the_whole(values, cut):
    whole, left, right = Averages(), Averages(), Averages()
    whole.add("x", torch.tensor(values))
    for part, some in ((left, values[:cut]), (right, values[cut:])):
        if some:
            part.add("x", torch.tensor(some))
    left.merge(right)
    assert left.compute()["x"] == pytest.approx(whole.compute()["x"], abs=1e-9)


def test_over_ranks_also_counts_what_only_one_rank_has(monkeypatch):
    ours, theirs = Averages(), Averages()
    ours.add("both", 1.0)
    theirs.add("both", torch.tensor([4.0, 4.0]))
    theirs.add("theirs", 5.0)

    def gather(everyone: list, sums: dict) -> None:
        everyone[:] = [sums, theirs.sums]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert over_ranks(ours, Ranks(SimpleNamespace(world_size=2))).compute() == {"both": 3.0, "theirs": 5.0}
    assert over_ranks(ours, Ranks(SimpleNamespace(world_size=1))).compute() == {"both": 1.0}


def test_the_share_that_a_weight_clips_is_over_the_steps_where_its_term_is_on():
    averages = Averages()
    on = torch.tensor([True, True, True, False])
    averages.add_clipped("KL/Constant", torch.tensor([0.0, 1.0, 0.5, 0.0]), on)
    assert averages.compute()["clipped/KL/Constant"] == pytest.approx(1 / 3)


@pytest.fixture
def said():
    generator = torch.Generator().manual_seed(0)
    student, viewed, blind = (Policy.random(generator, SHAPE, V) for _ in range(3))
    trajectories = batch(MASK, V)
    streams = {"teacher": Stream(viewed.teacher, without_view=blind.teacher)}
    log_probs = [x.logits(trajectories.mask).detach().log_softmax(-1) for x in (student, viewed, blind)]
    return student, streams, trajectories, log_probs


@pytest.mark.parametrize("chunk_steps", [1, 3, None])
@pytest.mark.parametrize("here", [[True, True, True], [True, False, True]])
def test_the_numbers_equal_their_definitions(said, here, chunk_steps, monkeypatch):
    monkeypatch.setattr(diagnostics, "OVERLAP_K", 2)
    student, streams, trajectories, (log_p, log_q, log_blind) = said
    row = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    on = torch.tensor(here)[row]
    p, q = log_p.exp(), log_q.exp()
    action = trajectories.actions[trajectories.mask][:, None]
    mine, theirs = log_p.topk(2).indices, log_q.topk(2).indices
    shared = (mine[:, :, None] == theirs[:, None]).any(-1).double()
    reverse = (p * (log_p - log_q)).sum(-1)
    expected = {
        "student_entropy": -(p * log_p).sum(-1).mean(),
        "teacher/entropy": -(q * log_q).sum(-1)[on].mean(),
        "teacher/kl_student_teacher": reverse[on].mean(),
        "teacher/kl_teacher_student": (q * (log_q - log_p)).sum(-1)[on].mean(),
        "teacher/overlap_top2": shared[on].mean(),
        "teacher/overlap_mass": (p.gather(-1, mine) * shared).sum(-1)[on].mean(),
        "teacher/privileged_gap": (log_q - log_blind).gather(-1, action).squeeze(-1)[on].mean(),
    }
    objective = Objective([Term(ReverseKL())], chunk_steps=chunk_steps)
    streams["teacher"] = dataclasses.replace(streams["teacher"], available=torch.tensor(here))
    _, averages = objective(student.distribution, streams, trajectories, diagnose=True)
    found = averages.compute()
    alone = objective.diagnose(student.distribution, streams, trajectories).compute()
    for name, value in expected.items():
        assert alone[name] == pytest.approx(float(value), rel=1e-5), name
        if on.all() or name.startswith("teacher/"):
            assert found[name] == pytest.approx(float(value), rel=1e-5), name


def test_the_first_step_is_logged_by_itself(said):
    student, streams, trajectories, (log_p, log_q, _) = said
    reverse = (log_p.exp() * (log_p - log_q)).sum(-1)
    objective = Objective([Term(ReverseKL())])
    found = objective.diagnose(student.distribution, streams, trajectories).compute()
    # of trajectory 1 the second position is the first that is trained
    assert found["teacher/kl_first_step"] == pytest.approx(float(reverse[[0, 3, 6]].mean()), rel=1e-5)


def gaussians(scales: list[float]) -> tuple[Gaussian, Gaussian]:
    """Of an event of 2 × 5, with a scale for each of four steps."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor(scales, dtype=torch.float64)[None, :, None, None]
    means = (torch.randn(3, 4, 2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    student, teacher = (Gaussian(mean, scale * factor) for mean, factor in zip(means, (1.0, 1.5), strict=True))
    return student, teacher


@pytest.mark.parametrize("chunk_steps", [1, 3, None])
@pytest.mark.parametrize("here", [[True, True, True], [True, False, True]])
@pytest.mark.parametrize("scales", [[0.3, 2.0, 0.05, 1.0], [0.3, 2.0, 0.05, 0.0]])
def test_gaussians_are_told_per_dimension(scales, here, chunk_steps):
    student, teacher = gaussians(scales)
    trajectories = batch(MASK, V, actions=torch.zeros(3, 4, 2, 5, dtype=torch.float64))
    row, step = trajectories.mask.nonzero().T
    dense = torch.tensor(scales)[step] > 0  # the last of some samplers has no density
    first = step == trajectories.mask.int().argmax(1)[row]
    on = torch.tensor(here)[row] & dense

    def normals(said: Gaussian, keep: torch.Tensor) -> torch.distributions.Normal:
        scale = said.scale.expand_as(said.mean)[row, step][keep]
        return torch.distributions.Normal(said.mean[row, step][keep], scale)

    p, q, mine = normals(student, on), normals(teacher, on), normals(student, dense)
    kl = torch.distributions.kl_divergence
    expected = {
        "student_entropy": mine.entropy().mean(),
        "teacher/entropy": q.entropy().mean(),
        "teacher/kl_student_teacher": kl(p, q).mean(),
        "teacher/kl_teacher_student": kl(q, p).mean(),
        "teacher/kl_first_step": kl(p, q)[first[on]].mean(),
    }
    objective = Objective([Term(ReverseKL())], chunk_steps=chunk_steps)
    found = objective.diagnose(student, {"teacher": Stream(teacher, torch.tensor(here))}, trajectories).compute()
    assert found == {name: pytest.approx(float(value), rel=1e-6) for name, value in expected.items()}


def test_of_a_sampler_without_noise_there_is_nothing_to_tell():
    student, teacher = gaussians([0.0] * 4)
    trajectories = batch(MASK, V, actions=torch.zeros(3, 4, 2, 5, dtype=torch.float64))
    assert Objective([Term(ReverseKL())]).diagnose(student, {"teacher": Stream(teacher)}, trajectories).compute() == {}


def test_a_stopwatch_reports_shares_and_speeds_and_starts_anew(monkeypatch):
    now = [7.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = Stopwatch()
    with watch.phase("rollout"):
        now[0] += 3
    with pytest.raises(KeyError), watch.phase("student"):
        raise KeyError
    watch.count("rollout", 10)
    now[0] += 1
    assert watch.read() == {
        "time/rollout_share": 0.75,
        "time/student_share": 0,
        "steps/rollout": 10,
        "speed/rollout_steps_per_s": pytest.approx(10 / 3),
    }
    assert watch.read() == {}
