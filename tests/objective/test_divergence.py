"""Divergences over a vocabulary against dense float64 references, and the laws that they obey."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from opd_lightning.distribution import CategoricalChunk
from opd_lightning.objective import (
    JSD,
    AlphaDivergence,
    Divergence,
    ForwardKL,
    Objective,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    Steps,
    Support,
    Term,
    TotalVariation,
)
from opd_lightning.objective.divergence import forward_kl_terms, jsd_terms, reverse_kl_terms
from tests.objective import reference
from tests.objective.reference import Policy, batch, close, dense, examples

V = 7
MASK = [[1, 1, 0], [1, 0, 1]]
SHAPE = (2, 3)
KL = reference.kl

SIGNALS: dict[str, tuple[Callable[..., Divergence], reference.Formula]] = {
    "forward_kl": (ForwardKL, lambda log_p, log_q: KL(log_q, log_p)),
    "reverse_kl": (ReverseKL, KL),
    "jsd_0": (lambda **s: JSD(0.0, **s), reference.jsd(0)),
    "jsd_.1": (lambda **s: JSD(0.1, **s), reference.jsd(0.1)),
    "jsd_.5": (JSD, reference.jsd(0.5)),
    "jsd_1": (lambda **s: JSD(1.0, **s), reference.jsd(1)),
    "skew_forward": (SkewForwardKL, lambda log_p, log_q: reference.kl_to_mixture(log_q, log_p, 0.1)),
    "skew_reverse": (lambda **s: SkewReverseKL(0.3, **s), lambda p, q: reference.kl_to_mixture(p, q, 0.3)),
    "alpha_0": (lambda **s: AlphaDivergence(0.0, **s), reference.alpha_divergence(0)),
    "alpha_.3": (lambda **s: AlphaDivergence(0.3, **s), reference.alpha_divergence(0.3)),
    "alpha_.5": (AlphaDivergence, reference.alpha_divergence(0.5)),
    "alpha_1": (lambda **s: AlphaDivergence(1.0, **s), reference.alpha_divergence(1)),
    "alpha_2": (lambda **s: AlphaDivergence(2.0, **s), reference.alpha_divergence(2)),
    "total_variation": (TotalVariation, reference.total_variation),
}
SUPPORTS = [
    ("full", "tail"),
    *((of, rest) for of in ("teacher", "student", "union") for rest in ("tail", "renormalize", "drop")),
    ("sampled", "tail"),
    ("sampled", "drop"),
]
KINDS = ("random", "wide", "huge", "identical", "one-hot teacher", "one-hot student", "both one-hot")
# finite although the teacher rules out what the student can still do
BOUNDED = {"forward_kl", "jsd_0", "jsd_.1", "jsd_.5", "skew_forward", "skew_reverse", "alpha_.3", "alpha_.5", "alpha_1"}


def pair(kind: str, seed: int, suppressed: tuple[int, ...], dtype: torch.dtype) -> tuple[Policy, Policy]:
    """Student and teacher with heads of different hidden size and different padding."""
    generator = torch.Generator().manual_seed(seed)
    scale = {"wide": 15.0, "huge": 3e3}.get(kind, 1.0)
    common = {"scale": scale, "suppressed": suppressed, "dtype": dtype}
    student = Policy.random(generator, SHAPE, V, hidden=3, rows=V + 2, **common)
    if kind == "identical":
        return student, student.copy()
    teacher = Policy.random(generator, SHAPE, V, hidden=4, rows=V + 1, **common)
    possible = student.possible
    with torch.no_grad():
        if "one-hot" in kind and "teacher" not in kind:
            student.layer.bias[possible[seed % len(possible)]] += 60
        if "one-hot" in kind and "student" not in kind:
            teacher.layer.bias[possible[(seed // 7) % len(possible)]] += 60
    return student, teacher


def has_gap(logits: torch.Tensor, k: int, least: float) -> bool:
    """Whether the k-th id is clearly ahead of the next; at a tie the top-k jumps and has no gradient."""
    ranked = logits.sort(-1, descending=True).values
    return k >= logits.shape[-1] or bool((ranked[:, k - 1] - ranked[:, k] > least).all())


@pytest.mark.parametrize(("of", "remainder"), SUPPORTS)
@pytest.mark.parametrize("name", SIGNALS)
@examples(10)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
    k=st.sampled_from([1, 3, 5, V]),
    temperature=st.sampled_from([1.0, 1.0, 0.5, 3.0, 1e-3]),
    clip=st.sampled_from([None, None, 0.05, 1.0]),
    suppressed=st.sampled_from([(), (2,), (0, 6)]),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
    chunk_steps=st.sampled_from([None, 1, 3]),
)
def test_value_and_gradient_equal_the_dense_reference(
    name, of, remainder, kind, seed, k, temperature, clip, suppressed, dtype, chunk_steps
):
    # q²/p leaves the range of floats; |x| has no derivative at 0
    assume(not (name == "alpha_2" and (kind not in ("random", "identical") or temperature < 0.5)))
    assume(not (name == "total_variation" and kind == "identical"))
    # in float32 the logits themselves are off by more than is compared here
    assume(dtype == torch.float64 or (kind != "huge" and temperature >= 0.5))
    make, formula = SIGNALS[name]
    student, teacher = pair(kind, seed, suppressed, dtype)
    k = None if of in ("full", "sampled") else k
    actions = torch.tensor(student.possible)[torch.arange(6).reshape(SHAPE) * (seed + 1) % len(student.possible)]
    trajectories = batch(MASK, V, actions=actions)
    mask, size = trajectories.mask, 4

    logits, targets = student.logits(mask), teacher.logits(mask).detach()
    scale = float(torch.stack([logits.detach(), targets]).abs().max()) / temperature
    tolerance = (1e-4 if dtype == torch.float32 else 1e-9) * (1 + scale / 30)
    if k is not None:
        assume(has_gap(logits, min(k, V), 1e-3) and has_gap(targets, min(k, V), 1e-3))
    index = torch.tensor([student.possible.index(a) for a in actions[mask].tolist()])
    expected = dense(formula, logits, targets, index, of, k, remainder, temperature, clip).sum() / size

    signal = make(support=Support(of, k, remainder), temperature=temperature, clip=clip)
    loss, _ = Objective([Term(signal)], chunk_steps=chunk_steps)(
        student.distribution, {"teacher": teacher.stream}, trajectories
    )
    close(loss, expected, max(tolerance, 1e-6))
    for actual, wanted in zip(student.gradients(loss), student.gradients(expected), strict=True):
        close(actual, wanted, tolerance / min(temperature, 1))


@pytest.mark.parametrize("remainder", ["tail", "renormalize", "drop"])
@pytest.mark.parametrize("of", ["intersection", "difference"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_.5"])
def test_value_and_gradient_on_what_both_rank_high_or_one_alone(name, of, remainder):
    make, formula = SIGNALS[name]
    for seed in range(6):
        student, teacher = pair("random", seed, (2,), torch.float64)
        trajectories = batch(MASK, V, actions=torch.zeros(SHAPE, dtype=torch.long))
        for k in (1, 3):
            logits, targets = student.logits(trajectories.mask), teacher.logits(trajectories.mask).detach()
            expected = dense(formula, logits, targets, torch.zeros(4, dtype=torch.long), of, k, remainder).sum() / 4
            signal = make(support=Support(of, k, remainder))
            loss, _ = Objective([Term(signal)])(student.distribution, {"teacher": teacher.stream}, trajectories)
            close(loss, expected, 1e-6)
            for actual, wanted in zip(student.gradients(loss), student.gradients(expected), strict=True):
                close(actual, wanted, 1e-9)


@pytest.mark.parametrize(("of", "remainder"), [s for s in SUPPORTS if s != ("student", "renormalize")])
@pytest.mark.parametrize("name", sorted(BOUNDED | {"total_variation"}))
def test_ids_that_only_the_teacher_rules_out(name, of, remainder):
    """−inf in the teacher's logits. (The student's own top-k may miss the teacher's support: no renormalization.)"""
    make, formula = SIGNALS[name]
    for seed in range(4):
        student, teacher = pair("random", seed, (2,), torch.float64)
        with torch.no_grad():
            teacher.layer.bias[[0, 1, 5]] = -math.inf
        trajectories = batch(MASK, V, actions=torch.tensor([[1, 3, 3], [4, 4, 5]]))
        k = None if of in ("full", "sampled") else 2
        index = torch.tensor([student.possible.index(a) for a in trajectories.actions[trajectories.mask].tolist()])
        logits = student.logits(trajectories.mask)
        expected = dense(formula, logits, teacher.logits(trajectories.mask).detach(), index, of, k, remainder).mean()
        signal = make(support=Support(of, k, remainder))
        loss, _ = Objective([Term(signal)])(student.distribution, {"teacher": teacher.stream}, trajectories)
        close(loss, expected, 1e-6)
        for actual, wanted in zip(student.gradients(loss), student.gradients(expected), strict=True):
            close(actual, wanted, 1e-9)


# -- laws ---------------------------------------------------------------------------------------------------------

LOGITS = st.integers(0, 10**6).map(
    lambda seed: torch.randn(2, 5, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * (seed % 9)
)


def evaluate(signal: Divergence, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """``[5]`` from logits ``[5, V]``."""
    steps = Steps.of(batch([[1] * 5], V)).opened(slice(None), CategoricalChunk(student), {}, {})
    return signal(steps.for_term("teacher", CategoricalChunk(teacher)))


@pytest.mark.parametrize("of", ["teacher", "student", "union", "sampled"])
@pytest.mark.parametrize("name", SIGNALS)
@examples(25)
@given(logits=LOGITS, k=st.integers(1, V - 1))
def test_with_a_tail_never_negative_and_never_more_than_the_full_one(name, of, logits, k):
    """The tail is a coarser view of the same pair: the data-processing inequality."""
    student, teacher = logits
    coarse = evaluate(SIGNALS[name][0](support=Support(of, None if of == "sampled" else k)), student, teacher)
    full = evaluate(SIGNALS[name][0](), student, teacher)
    assert (coarse >= -1e-12 * (1 + full)).all()
    assert (coarse <= full * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("remainder", ["tail", "renormalize", "drop"])
@pytest.mark.parametrize("of", ["teacher", "student", "union"])
@pytest.mark.parametrize("name", SIGNALS)
def test_at_k_of_the_vocabulary_equals_the_full_one(name, of, remainder):
    student, teacher = torch.randn(2, 5, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    make = SIGNALS[name][0]
    for k in (V, V + 10):
        partial = evaluate(make(support=Support(of, k, remainder)), student, teacher)
        assert torch.equal(partial, evaluate(make(), student, teacher))


@pytest.mark.parametrize("of", ["full", "teacher", "student", "union", "sampled"])
@pytest.mark.parametrize("name", SIGNALS)
def test_zero_with_zero_gradient_where_student_and_teacher_agree(name, of):
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    support = Support(of, None if of in ("full", "sampled") else 2)
    student = logits.clone().requires_grad_()
    value = evaluate(SIGNALS[name][0](support=support), student, logits)
    value.sum().backward()
    close(value, torch.zeros(5), 1e-14)
    close(student.grad, torch.zeros(5, V), 1e-14)


@pytest.mark.parametrize("of", ["teacher", "student", "union"])
def test_the_naive_truncated_form_pulls_even_an_equal_student_away(of):
    """Why ``drop`` has to be asked for by name: Σ_topk q·(log q − log p) has gradient q·p(S) − q on its support."""
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    student = logits.clone().requires_grad_()
    evaluate(ForwardKL(support=Support(of, 2, "drop")), student, logits).sum().backward()
    assert float(student.grad.abs().max()) > 0.05
    moved = logits + torch.randn(5, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert float(evaluate(ReverseKL(support=Support("teacher", 2, "drop")), moved, logits).min()) < 0


@examples(25)
@given(logits=LOGITS)
def test_the_ends_of_jsd_are_the_two_kls(logits):
    student, teacher = logits
    assert torch.equal(evaluate(JSD(0.0), student, teacher), evaluate(ForwardKL(), student, teacher))
    assert torch.equal(evaluate(JSD(1.0), student, teacher), evaluate(ReverseKL(), student, teacher))
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    swapped = evaluate(JSD(0.3), teacher, student)
    close(evaluate(JSD(0.7), student, teacher), swapped, 1e-12)
    assert (evaluate(JSD(0.5), student, teacher) <= math.log(2) + 1e-12).all()
    assert torch.equal(jsd_terms(log_p, log_q, 0.0), forward_kl_terms(log_p, log_q))
    assert torch.equal(jsd_terms(log_p, log_q, 1.0), reverse_kl_terms(log_p, log_q))


def test_jsd_over_beta_approaches_the_kls_while_jsd_itself_vanishes():
    student, teacher = torch.randn(2, 5, V, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    small = 1e-6
    low, high = evaluate(JSD(small), student, teacher), evaluate(JSD(1 - small), student, teacher)
    torch.testing.assert_close(low / small, evaluate(ForwardKL(), student, teacher), rtol=1e-4, atol=0)
    torch.testing.assert_close(high / small, evaluate(ReverseKL(), student, teacher), rtol=1e-4, atol=0)
    assert float(low.max()) < 1e-5


@examples(25)
@given(logits=LOGITS, alpha=st.sampled_from([0.01, 0.1, 0.5, 0.9]))
def test_skewed_kls_are_bounded_by_minus_log_alpha(logits, alpha):
    student, teacher = logits * 20
    for signal in (SkewForwardKL(alpha), SkewReverseKL(alpha)):
        value = evaluate(signal, student, teacher)
        assert (value <= -math.log(alpha) + 1e-9).all()
    assert (evaluate(SkewForwardKL(alpha), student, teacher) <= evaluate(ForwardKL(), student, teacher) + 1e-9).all()


@examples(25)
@given(logits=LOGITS)
def test_total_variation_is_at_most_one_and_obeys_pinsker(logits):
    student, teacher = logits
    distance = evaluate(TotalVariation(), student, teacher)
    assert (distance <= 1 + 1e-12).all()
    assert (2 * distance**2 <= evaluate(ForwardKL(), student, teacher) + 1e-12).all()


@examples(25)
@given(logits=LOGITS, temperature=st.sampled_from([0.5, 1.0, 4.0]))
def test_the_gradient_of_forward_kl_in_the_logits_is_p_minus_q(logits, temperature):
    student, teacher = logits[0].requires_grad_(), logits[1]
    evaluate(ForwardKL(temperature=temperature), student, teacher).sum().backward()
    p, q = (student.detach() / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    close(student.grad, (p - q) / temperature, 1e-12)


def test_temperature_is_the_signals_own_and_is_not_squared_back():
    student, teacher = torch.randn(2, 5, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    hot = evaluate(ReverseKL(temperature=2.0), student, teacher)
    assert torch.equal(hot, evaluate(ReverseKL(), student / 2, teacher / 2))


def test_clipped_ids_have_no_gradient():
    student = torch.tensor([[0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[3.0, 0.0, -1.0]], dtype=torch.float64)
    steps = Steps.of(batch([[1]], 3)).opened(slice(None), CategoricalChunk(student), {}, {})
    steps.target = CategoricalChunk(teacher)
    log_p, log_q = student.detach().log_softmax(-1), teacher.log_softmax(-1)
    terms = KL(log_q, log_p)
    assert float(terms.max()) > 0.05
    value = ForwardKL(clip=0.05)(steps)
    torch.testing.assert_close(value, terms.clamp(max=0.05).sum(-1))
    value.backward()
    q = log_q.exp() * (terms <= 0.05)
    close(student.grad, log_p.exp() * q.sum() - q, 1e-12)


@pytest.mark.parametrize("of", [None, Support("teacher", 3), Support("union", 2, "renormalize")])
@pytest.mark.parametrize("name", [n for n in SIGNALS if n != "alpha_2"])
def test_float32_at_logits_of_ten_thousand_stays_finite(name, of):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        student = (torch.randn(5, V, generator=generator) * 1e4).requires_grad_()
        teacher = torch.randn(5, V, generator=generator) * 1e4
        value = evaluate(SIGNALS[name][0](**({} if of is None else {"support": of})), student, teacher)
        value.sum().backward()
        assert torch.isfinite(value).all()
        assert torch.isfinite(student.grad).all()


# -- construction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ForwardKL, ReverseKL, JSD, SkewForwardKL, AlphaDivergence, TotalVariation])
def test_temperature_and_clip_must_be_positive(make):
    with pytest.raises(ValueError, match=r"signal\.temperature must be > 0, got 0"):
        make(temperature=0)
    with pytest.raises(ValueError, match=r"signal\.clip must be > 0, got -1"):
        make(clip=-1)


def test_out_of_range_settings_are_refused_with_the_range():
    with pytest.raises(ValueError, match=r"signal\.beta must be in \[0, 1\], got 1\.5"):
        JSD(beta=1.5)
    for make in (SkewForwardKL, SkewReverseKL):
        for alpha in (0, 1):
            with pytest.raises(
                ValueError, match=rf"signal\.alpha must be in \(0, 1\), got {alpha}; the plain KL is its"
            ):
                make(alpha=alpha)


class Powered(Divergence):
    """KL(q‖p) to a power of each id's term, by somebody who calls no other class's ``__init__``."""

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def categorical(self, log_p, log_q):
        return forward_kl_terms(log_p, log_q) * self.power


class Closed(Powered):
    def gaussian(self, p, q):
        return (p.mean - q.mean).flatten(1).sum(1)


def test_a_divergence_of_ones_own_has_every_setting_without_calling_super():
    student, teacher = pair("random", 3, (), torch.float64)
    trajectories = batch(MASK, V, actions=torch.zeros(SHAPE, dtype=torch.long))
    losses = [
        Objective([Term(signal)])(student.distribution, {"teacher": teacher.stream}, trajectories).loss
        for signal in (Powered(2.0), ForwardKL())
    ]
    close(losses[0], 2 * losses[1], 1e-9)
    assert Powered().needs == {"teacher", "distribution", "categorical"}, "Gaussians are refused when it is built"
    assert Closed().needs == {"teacher", "distribution"}
