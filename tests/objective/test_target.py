"""Targets: logit algebra over streams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.distribution import IMPOSSIBLE, CategoricalChunk, Gaussian
from opd_lightning.objective import ForwardKL, LogLinear, Objective, Term
from tests.objective.reference import Policy, batch, close, dense, examples, kl

V = 6
SEEDS = st.integers(0, 10**6)


def logits(seed: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, V, generator=generator, dtype=torch.float64) * 3 for _ in range(count)]


def apply(coefficients: dict[str, float], **streams: torch.Tensor) -> torch.Tensor:
    """``[4, V]`` probabilities."""
    target = LogLinear(coefficients)({name: CategoricalChunk(z) for name, z in streams.items()})
    return target.log_probs().exp()


@examples(25)
@given(seed=SEEDS, share=st.sampled_from([0.0, 0.3, 1.0, 1.25, 3.0]))
def test_over_the_vocabulary_it_is_the_softmax_of_mixed_logits(seed, share):
    teacher, reference = logits(seed, 2)
    found = apply({"teacher": share, "reference": 1 - share}, teacher=teacher, reference=reference)
    close(found, (share * teacher + (1 - share) * reference).softmax(-1), 1e-12)


@examples(10)
@given(seed=SEEDS)
def test_the_ends_are_the_teacher_and_the_reference(seed):
    teacher, reference = logits(seed, 2)
    streams = {"teacher": teacher, "reference": reference}
    close(apply({"teacher": 1.0, "reference": 0.0}, **streams), teacher.softmax(-1), 1e-12)
    close(apply({"teacher": 0.0, "reference": 1.0}, **streams), reference.softmax(-1), 1e-12)
    close(apply({"teacher": 1.0}, teacher=teacher), teacher.softmax(-1), 1e-12)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 1.25, -1.0])
def test_what_is_impossible_stays_impossible(share):
    teacher, reference = logits(0, 2)
    teacher[:, 2] = reference[:, 2] = IMPOSSIBLE
    teacher[:, 4] = IMPOSSIBLE
    found = apply({"teacher": share, "reference": 1 - share}, teacher=teacher, reference=reference)
    assert (found[:, [2, 4]] == 0).all()
    close(found.sum(-1), torch.ones(4), 1e-12)


def test_the_student_is_a_stream_of_its_own_and_detached():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (Policy.random(generator, (1, 3), V) for _ in range(2))
    trajectories = batch([[1, 1, 1]], V)
    term = Term(ForwardKL(), target=LogLinear({"teacher": 0.6, "student": 0.4}))
    assert term.teachers == {"teacher"}
    loss, _ = Objective([term])(student.distribution, {"teacher": teacher.stream}, trajectories)
    ours, theirs = student.logits(trajectories.mask), teacher.logits(trajectories.mask)
    mixed = (0.6 * theirs + 0.4 * ours).detach()
    expected = dense(lambda p, q: kl(q, p), ours, mixed, torch.zeros(3, dtype=torch.long)).mean()
    close(loss, expected, 1e-6)
    for actual, gradient in zip(student.gradients(loss), student.gradients(expected), strict=True):
        close(actual, gradient, 1e-7)


def test_of_gaussians_it_is_the_normalized_product_of_powers():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    scales = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64) + 0.5
    parts = {"teacher": Gaussian(means[0], scales[0]), "reference": Gaussian(means[1], scales[1])}
    found = LogLinear({"teacher": 1.2, "reference": -0.1})(parts)
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    normals = [torch.distributions.Normal(means[i][..., None], scales[i][..., None]).log_prob(x) for i in range(2)]
    density = (1.2 * normals[0] - 0.1 * normals[1]).exp()
    density = density / torch.trapezoid(density, x)[..., None]
    mean = torch.trapezoid(density * x, x)
    close(found.mean, mean, 1e-9)
    close(found.scale, torch.trapezoid(density * (x - mean[..., None]) ** 2, x).sqrt(), 1e-9)


def test_errors_name_the_key():
    with pytest.raises(ValueError, match=r"target\.coefficients must name 'teacher', got \['reference'\]"):
        LogLinear({"reference": 1.0})
    flat = Gaussian(torch.zeros(1, 1), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"target\.coefficients: the combined Gaussian has no positive precision"):
        LogLinear({"teacher": 1.0, "reference": -1.0})({"teacher": flat, "reference": flat})
