"""Weights, normalizers, and where a term is on."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd_lightning.distribution import Stream
from opd_lightning.objective import (
    ByReward,
    Constant,
    CrossEntropy,
    Entropy,
    Length,
    LogRatio,
    Objective,
    Outcome,
    PassRate,
    PolicyGradient,
    ReverseKL,
    Steps,
    Term,
    TopEntropy,
    Turns,
    Weight,
    Window,
)
from opd_lightning.objective.weight import at_least
from opd_lightning.rollout_settings import Rollout
from tests.callbacks import toy
from tests.objective.reference import Policy, batch, close, dense, kl
from tests.tiny import act, fit, make_module

V = 6
MASK = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]]
SHAPE = (3, 5)
ROW = torch.tensor([0] * 3 + [1] * 5 + [2] * 3)
POSITION = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2])
TURN = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1])
N = 11


@pytest.fixture
def world():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (Policy.random(generator, SHAPE, V) for _ in range(2))
    trajectories = batch(MASK, V, reward=torch.tensor([1.0, 0.25, -2.0]), group_mean=torch.tensor([1.0, 0.25, 0.5]))
    turn = torch.full(SHAPE, 9)
    turn[trajectories.mask] = TURN
    trajectories.channels["turn"] = turn
    return student, teacher, trajectories


def divergences(student: Policy, teacher: Policy, mask: Tensor) -> Tensor:
    """``[N]``"""
    return dense(kl, student.logits(mask), teacher.logits(mask).detach(), torch.zeros(N, dtype=torch.long))


def entropy(policy: Policy, mask: Tensor) -> Tensor:
    log_probs = policy.logits(mask).detach().log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def last_two(mask: Tensor, count: int = 2) -> Tensor:
    """1 for the last trained steps of each trajectory, by a loop."""
    last = torch.zeros(mask.shape)
    for row, here in enumerate(mask):
        last[row, here.nonzero().flatten()[-count:]] = 1
    return last[mask].double()


def share_of_highest(values: Tensor, share: float) -> Tensor:
    return (values >= values.quantile(1 - share)).double()


def weights(student: Policy, teacher: Policy, mask: Tensor) -> list[tuple[Weight, Tensor]]:
    """Every weight, and what it is at each of the N steps."""
    ours, theirs = entropy(student, mask), entropy(teacher, mask)
    by_row = torch.cat([share_of_highest(theirs[row == ROW], 0.4) for row in range(3)])
    return [
        (Constant(0.5), torch.full((N,), 0.5)),
        (Constant(0.0), torch.zeros(N)),
        (Window(stop=2), (POSITION < 2).double()),
        (Window(start=1, stop=3), ((POSITION >= 1) & (POSITION < 3)).double()),
        (Window(start=9), torch.zeros(N)),
        (Window(last=2), last_two(mask)),
        (Window(start=2, last=1), last_two(mask, 1) * (POSITION >= 2)),
        (Turns(start=1), (TURN >= 1).double()),
        (Turns(stop=1), (TURN < 1).double()),
        (Turns(last=1), torch.tensor([1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1]).double()),
        (Entropy(), (-theirs).exp()),
        (Entropy("student", beta=-0.5), (0.5 * ours).exp()),
        (TopEntropy(0.3), share_of_highest(ours, 0.3)),
        (TopEntropy(0.3, of="teacher"), share_of_highest(theirs, 0.3)),
        (TopEntropy(0.4, of="teacher", scope="row"), by_row),
        (TopEntropy(1.0), torch.ones(N)),
        (Outcome(), (ROW == 0).double()),
        (Outcome(right=0.0, wrong=2.0, threshold=0.25), 2.0 * (ROW == 2)),
        (ByReward(), torch.tensor([1.0, 0.25, 0.0])[ROW]),
        (PassRate(), torch.tensor([0.0, 0.25 * 0.75, 0.25])[ROW]),
        (PassRate(easy=2.0, hard=0.5), torch.tensor([0.0, 0.25**2 * 0.75**0.5, 0.5**2.5])[ROW]),
        (Length(per=4), mask.sum(1)[ROW] / 4),
    ]


@pytest.mark.parametrize("normalizer", ["steps", "weights"])
@pytest.mark.parametrize("chunk_steps", [1, 4, None])
@pytest.mark.parametrize("which", range(22))
def test_value_and_gradient_of_each_weight(world, which, chunk_steps, normalizer):
    student, teacher, trajectories = world
    mask = trajectories.mask
    weight, expected = weights(student, teacher, mask)[which]
    objective = Objective([Term(ReverseKL(), weights=[weight], normalizer=normalizer)], chunk_steps=chunk_steps)
    loss, averages = objective(student.distribution, {"teacher": teacher.stream}, trajectories)
    total = N if normalizer == "steps" else float(expected.sum()) or 1.0
    wanted = (divergences(student, teacher, mask) * expected).sum() / total
    close(loss, wanted, 1e-6)
    for actual, gradient in zip(student.gradients(loss), student.gradients(wanted), strict=True):
        close(actual, gradient, 1e-6)
    clipped = averages.compute()[f"clipped/ReverseKL/{type(weight).__name__}"]
    assert clipped == pytest.approx(float((expected == 0).double().mean()))


def test_weights_multiply_and_each_is_counted(world):
    student, teacher, trajectories = world
    parts = [weights(student, teacher, trajectories.mask)[i] for i in (3, 11, 14)]
    term = Term(ReverseKL(), weights=[weight for weight, _ in parts], coefficient=3.0, normalizer="weights")
    loss, averages = Objective([term])(student.distribution, {"teacher": teacher.stream}, trajectories)
    product = parts[0][1] * parts[1][1] * parts[2][1]
    expected = 3 * (divergences(student, teacher, trajectories.mask) * product).sum() / product.sum()
    close(loss, expected, 1e-6)
    means = averages.compute()
    assert {"clipped/ReverseKL/Window", "clipped/ReverseKL/Entropy", "clipped/ReverseKL/TopEntropy"} <= set(means)


@given(
    values=st.lists(st.sampled_from([0.0, 0.25, 0.5, 2.0]), min_size=1, max_size=40),
    share=st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0]),
    noise=st.integers(0, 2**32 - 1),
)
def test_equal_states_are_in_or_out_together(values, share, noise):
    """Whatever their rounding is, and whatever that of the share's rank."""
    exact = torch.tensor(values, dtype=torch.float64)
    rank = math.ceil((1 - Fraction(str(share))) * (len(values) - 1))
    wanted = exact >= exact.sort().values[rank]
    rounded = exact * (1 + 1e-6 * torch.randn(len(values), generator=torch.Generator().manual_seed(noise)))
    assert torch.equal(rounded.float() >= at_least(rounded.float(), share), wanted)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_share_of_equal_states_is_all_of_them_however_the_batch_is_cut(size, tiny_student, tiny_teacher, tmp_path):
    """Their entropies differ by a rounding, for each is computed in other company."""
    objective = Objective([Term(ReverseKL(), weights=[TopEntropy(0.3)], normalizer="weights")])
    rollout = Rollout(batch_size=6, micro_batch_size=size, horizon=1)
    module = make_module(tiny_student, tiny_teacher, objective, rollout=rollout)
    trainer = fit(module, tmp_path, [{"prompt": "11+11="}] * 6, accumulate_grad_batches=6 // size)
    assert trainer.callback_metrics["train/clipped/ReverseKL/TopEntropy"] == 0


def test_a_share_of_more_states_than_torch_takes_quantiles_of():
    many = torch.arange(2**24 + 3.0)
    assert int((many >= at_least(many, 0.5)).sum()) == pytest.approx(len(many) / 2, rel=1e-3)


def test_a_weight_has_no_gradient(world):
    """With a soft weight of the student's own entropy the gradient is weight times that of the divergence."""
    student, teacher, trajectories = world
    loss, _ = Objective([Term(ReverseKL(), weights=[Entropy("student")])])(
        student.distribution, {"teacher": teacher.stream}, trajectories
    )
    factor = (-entropy(student, trajectories.mask)).exp()
    expected = (divergences(student, teacher, trajectories.mask) * factor).sum() / N
    for actual, gradient in zip(student.gradients(loss), student.gradients(expected), strict=True):
        close(actual, gradient, 1e-6)


def test_a_weight_that_reads_the_student_leaves_the_other_terms_their_gradient(world):
    student, teacher, trajectories = world
    streams = {"teacher": teacher.stream}
    first = Term(CrossEntropy(), teacher=None, weights=[Entropy("student")])
    second = Term(ReverseKL())

    def gradient(*terms: Term) -> list[Tensor]:
        return student.gradients(Objective(list(terms))(student.distribution, streams, trajectories)[0])

    for both, one, two in zip(gradient(first, second), gradient(first), gradient(second), strict=True):
        close(both, one + two, 1e-7)


def test_one_weight_object_in_two_terms_is_evaluated_for_each(world):
    student, teacher, trajectories = world
    streams = {"a": teacher.stream, "b": Policy.random(torch.Generator().manual_seed(5), SHAPE, V).stream}

    def loss(*terms: tuple[str, Weight]) -> Tensor:
        listed = [Term(ReverseKL(), teacher=name, weights=[weight]) for name, weight in terms]
        return Objective(listed)(student.distribution, streams, trajectories)[0]

    for scope in ("row", "generation"):
        shared = TopEntropy(0.3, of="teacher", scope=scope)
        close(loss(("a", shared), ("b", shared)), loss(("a", shared)) + loss(("b", shared)), 1e-6)


# -- where a term is on ---------------------------------------------------------------------------------------------


def test_a_term_with_a_source_trains_on_that_behavior_only(world):
    student, teacher, trajectories = world
    trajectories.sources, trajectories.source = ("student", "dataset"), torch.tensor([0, 1, 0])
    terms = [Term(ReverseKL(), source="student"), Term(CrossEntropy(), None, source="dataset", normalizer="weights")]
    loss, averages = Objective(terms, chunk_steps=2)(student.distribution, {"teacher": teacher.stream}, trajectories)
    mask = trajectories.mask
    each = divergences(student, teacher, mask)
    log_prob = student.logits(mask).log_softmax(-1).gather(-1, trajectories.actions[mask][:, None]).squeeze(-1)
    expected = each[ROW != 1].sum() / N - log_prob[ROW == 1].mean()
    close(loss, expected, 1e-6)
    for actual, gradient in zip(student.gradients(loss), student.gradients(expected), strict=True):
        close(actual, gradient, 1e-6)
    means = averages.compute()
    assert means["loss/ReverseKL"] == pytest.approx(float(each[ROW != 1].detach().mean()), rel=1e-5)
    assert means["loss/CrossEntropy"] == pytest.approx(float(-log_prob[ROW == 1].detach().mean()), rel=1e-5)


@pytest.mark.parametrize("normalizer", ["steps", "weights"])
def test_without_a_view_a_term_is_off_and_not_in_its_sum_of_weights(world, normalizer):
    student, teacher, trajectories = world
    weight = Entropy()
    term = Term(ReverseKL(), weights=[weight], normalizer=normalizer)
    streams = {"teacher": Stream(teacher.teacher, torch.tensor([True, False, True]))}
    loss, _ = Objective([term])(student.distribution, streams, trajectories)
    on = ROW != 1
    factor = (-entropy(teacher, trajectories.mask)).exp()
    total = N if normalizer == "steps" else factor[on].sum()
    expected = (divergences(student, teacher, trajectories.mask) * factor)[on].sum() / total
    close(loss, expected, 1e-6)
    gradients = student.gradients(loss)
    assert (gradients[0][1] == 0).all()
    for actual, gradient in zip(gradients, student.gradients(expected), strict=True):
        close(actual, gradient, 1e-6)


def test_what_a_teacher_without_a_view_says_is_never_read(world):
    """Rows without a view hold anything at all: their contribution is 0 exactly, in the log as in the gradient."""
    student, teacher, trajectories = world
    trajectories.behavior_log_probs = trajectories.behavior_log_probs.double()
    here = torch.tensor([True, False, True])
    found = []
    for filling in (0.0, 1e3):
        said = teacher.teacher
        said.hidden[1] = filling
        terms = [Term(ReverseKL()), Term(PolicyGradient(LogRatio())), Term(CrossEntropy(), None)]
        loss, averages = Objective(terms)(student.distribution, {"teacher": Stream(said, here)}, trajectories)
        found.append(([loss, *student.gradients(loss)], averages.compute()))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1]


def test_a_target_needs_all_its_streams(world):
    student, teacher, trajectories = world
    from opd_lightning.objective import LogLinear

    streams = {
        "teacher": Stream(teacher.teacher, torch.tensor([True, False, True])),
        "reference": Stream(student.teacher, torch.tensor([True, True, False])),
    }
    term = Term(ReverseKL(), target=LogLinear({"teacher": 1.25, "reference": -0.25}))
    loss, _ = Objective([term])(student.distribution, streams, trajectories)
    gradient = student.gradients(loss)[0]
    assert (gradient[0, :3] != 0).all()
    assert (gradient[1:] == 0).all()


# -- construction -------------------------------------------------------------------------------------------------


def test_out_of_range_settings_are_refused():
    with pytest.raises(ValueError, match=r"weight\.value must be >= 0, got -1"):
        Constant(-1)
    for start, stop in ((-1, None), (3, 3), (3, 2)):
        with pytest.raises(ValueError, match=rf"weight: need 0 <= start < stop, got start={start}, stop={stop}"):
            Window(start, stop)
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=rf"weight\.share must be in \(0, 1\], got {share}"):
            TopEntropy(share)
    with pytest.raises(ValueError, match="weight: right and wrong must be >= 0, got 1 and -1"):
        Outcome(1, -1)
    with pytest.raises(ValueError, match="PassRate: easy and hard must be > 0, got 0 and 1"):
        PassRate(0)


@pytest.mark.parametrize(("easy", "hard"), [(1.0, 1.0), (2.0, 1.0), (0.5, 1.5)])
def test_the_pass_rate_weighs_most_at_its_peak_and_nothing_at_the_ends(easy, hard):
    rates = torch.linspace(0, 1, 101)
    trajectories = batch([[1]] * 101, V, reward=rates, group_mean=rates)
    found = PassRate(easy, hard)(Steps.of(trajectories))
    assert found[0] == found[-1] == 0
    assert abs(float(rates[found.argmax()]) - easy / (easy + hard)) <= 0.01


def test_the_position_of_a_step_counts_the_trained_ones_before_it():
    steps = Steps.of(batch(MASK, V))
    assert steps.position.tolist() == POSITION.tolist()
    assert steps.trajectory.tolist() == ROW.tolist()
    assert math.isclose(float(Window(stop=1)(steps).sum()), 3), "an observation before them takes none of their places"


def test_a_trajectorys_own_weight_multiplies_every_term_and_cancels_where_weights_are_the_normalizer():
    module = toy.make_module()
    module.configure_model()
    rolled = act(module, toy.make_rows(6), horizon=5)

    def train(objective: Objective, *weights: list[float]) -> tuple[float, Tensor]:
        weighed = dataclasses.replace(rolled)
        for weight in weights:
            weighed.weigh(torch.tensor(weight))
        module.zero_grad()
        student = module.distribution(module.policies["student"], weighed)
        loss, _ = objective(student, module.streams.query_all(module.objective.teachers(), weighed), weighed)
        loss.backward()
        return float(loss), torch.cat([p.grad.flatten() for p in module.student.parameters()])

    terms = Objective([Term(ReverseKL()), Term(CrossEntropy(), teacher=None)])
    plain, gradient = train(terms)
    half, halved = train(terms, [0.25] * 6, [2.0] * 6)
    assert half == pytest.approx(plain / 2)
    assert torch.allclose(halved, gradient / 2, atol=1e-6)
    assert not train(terms, [0.0] * 6)[1].any()
    shares = Objective([Term(ReverseKL(), normalizer="weights")])
    assert train(shares, [1.0, 2, 3, 4, 5, 6])[0] == pytest.approx(train(shares, [0.5, 1, 1.5, 2, 2.5, 3])[0])
    assert train(shares, [1.0, 2, 3, 4, 5, 6])[0] != pytest.approx(train(shares)[0])
