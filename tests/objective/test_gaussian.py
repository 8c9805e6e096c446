"""Divergences between Gaussians: closed forms against torch.distributions and numeric integration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd_lightning.distribution import Gaussian, Stream
from opd_lightning.objective import (
    JSD,
    AlphaDivergence,
    CrossEntropy,
    Divergence,
    Entropy,
    ForwardKL,
    Objective,
    ReverseKL,
    SkewForwardKL,
    Steps,
    Support,
    Term,
    TotalVariation,
)
from tests.objective.reference import batch, close, examples

SHAPE = (2, 3, 2, 2)  # B, T, and an event of 2 × 2
MASK = [[1, 1, 0], [1, 0, 1]]


def normals(seed: int, scales: str = "tensor") -> tuple[Gaussian, Gaussian]:
    generator = torch.Generator().manual_seed(seed)

    def one() -> Gaussian:
        mean = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        scale = torch.rand(SHAPE, generator=generator, dtype=torch.float64) + 0.5
        scale = {"tensor": scale, "scalar": scale[0, 0, 0, 0], "per state": scale[:, :, :1, :1]}[scales]
        return Gaussian(mean, scale.clone())

    return one(), one()


def evaluate(signal: Divergence, p: Gaussian, q: Gaussian) -> Tensor:
    """``[6]`` at all states."""
    steps = Steps.of(batch([[1, 1, 1]] * 2, 1))
    opened = steps.opened(slice(None), p.at(steps.index), {}, {})
    return signal(opened.for_term("teacher", q.at(steps.index)))


def torch_kl(a: Gaussian, b: Gaussian) -> Tensor:
    """``[6]``"""
    a, b = (torch.distributions.Normal(x.mean, x.scale.expand_as(x.mean)) for x in (a, b))
    return torch.distributions.kl_divergence(a, b).flatten(2).sum(-1).flatten()


def integrate(p: Gaussian, q: Gaussian, alpha: float) -> Tensor:
    """``[6]`` Π over the event of ∫ q^α p^(1−α), by the trapezoidal rule."""
    x = torch.linspace(-40, 40, 160_001, dtype=torch.float64)
    log_p = torch.distributions.Normal(p.mean[..., None], p.scale.expand_as(p.mean)[..., None]).log_prob(x)
    log_q = torch.distributions.Normal(q.mean[..., None], q.scale.expand_as(q.mean)[..., None]).log_prob(x)
    return torch.trapezoid((alpha * log_q + (1 - alpha) * log_p).exp(), x).flatten(2).prod(-1).flatten()


@pytest.mark.parametrize("scales", ["tensor", "scalar", "per state"])
@examples(10)
@given(seed=st.integers(0, 10**6))
def test_kls_equal_those_of_torch_distributions(scales, seed):
    p, q = normals(seed, scales)
    close(evaluate(ForwardKL(), p, q), torch_kl(q, p), 1e-12)
    close(evaluate(ReverseKL(), p, q), torch_kl(p, q), 1e-12)
    close(evaluate(AlphaDivergence(1.0), p, q), torch_kl(q, p), 1e-12)
    close(evaluate(AlphaDivergence(0.0), p, q), torch_kl(p, q), 1e-12)


@pytest.mark.parametrize("alpha", [0.5, 0.3, 0.9, -0.2, 1.2])
def test_alpha_divergence_equals_numeric_integration(alpha):
    for seed in range(2):
        p, q = normals(seed)
        p.scale, q.scale = p.scale * 0.2 + 0.8, q.scale * 0.2 + 0.8
        expected = (integrate(p, q, alpha) - 1) / (alpha * (alpha - 1))
        close(evaluate(AlphaDivergence(alpha), p, q), expected, 1e-9)


@pytest.mark.parametrize("scales", ["tensor", "scalar"])
def test_total_variation_at_equal_scales_equals_numeric_integration(scales):
    """Of isotropic normals it is the one-dimensional one along the line between the means."""
    p, q = normals(0, scales)
    q.scale = p.scale
    distance = ((p.mean - q.mean) / p.scale).flatten(2).norm(dim=-1).flatten()
    x = torch.linspace(-20, 20, 200_001, dtype=torch.float64)
    here, there = (torch.distributions.Normal(m[:, None], 1.0).log_prob(x).exp() for m in (distance * 0, distance))
    close(evaluate(TotalVariation(), p, q), torch.trapezoid((here - there).abs() / 2, x), 1e-7)


@pytest.mark.parametrize("signal", [ForwardKL(), ReverseKL(), AlphaDivergence(), AlphaDivergence(0.2)])
def test_gradients_in_mean_and_scale(signal):
    p, q = normals(7)

    def function(mean: Tensor, scale: Tensor) -> Tensor:
        return evaluate(signal, Gaussian(mean, scale), q)

    assert torch.autograd.gradcheck(function, (p.mean.requires_grad_(), p.scale.requires_grad_()))


def test_gradient_of_total_variation_in_the_mean():
    p, q = normals(7, "scalar")
    mean = p.mean.requires_grad_()
    assert torch.autograd.gradcheck(lambda m: evaluate(TotalVariation(), Gaussian(m, q.scale), q), (mean,))


@pytest.mark.parametrize("signal", [ForwardKL(), ReverseKL(), AlphaDivergence(), TotalVariation()])
@pytest.mark.parametrize("scales", ["tensor", "scalar"])
def test_zero_with_zero_gradient_where_student_and_teacher_agree(signal, scales):
    p, _ = normals(3, scales)
    mean = p.mean.clone().requires_grad_()
    value = evaluate(signal, Gaussian(mean, p.scale), p)
    value.sum().backward()
    close(value, torch.zeros(6), 1e-11)
    close(mean.grad, torch.zeros(SHAPE), 1e-10)


@pytest.mark.parametrize("learned", ["tensor", "scalar", "per state", "no"])
@pytest.mark.parametrize("chunk_steps", [1, 3, None])
def test_chunks_give_the_gradient_of_the_whole(learned, chunk_steps):
    p, q = normals(5, "tensor" if learned == "no" else learned)
    inputs = [p.mean.requires_grad_()] + ([p.scale.requires_grad_()] if learned != "no" else [])
    trajectories = batch(MASK, 1)
    expected = torch_kl(p, q)[trajectories.mask.flatten()].mean()
    loss, _ = Objective([Term(ReverseKL())], chunk_steps=chunk_steps)(p, {"teacher": Stream(q)}, trajectories)
    close(loss, expected, 1e-6)
    for actual, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        close(actual, wanted, 1e-12)


def test_cross_entropy_and_the_entropy_weight_read_the_whole_event():
    p, _ = normals(6)
    trajectories = batch(MASK, 1, actions=torch.randn(SHAPE, dtype=torch.float64))
    index = trajectories.mask.flatten()
    normal = torch.distributions.Normal(p.mean, p.scale)
    log_prob = normal.log_prob(trajectories.actions).flatten(2).sum(-1).flatten()[index]
    loss, _ = Objective([Term(CrossEntropy(), teacher=None)])(p, {}, trajectories)
    close(loss, -log_prob.mean(), 1e-6)
    entropy = normal.entropy().flatten(2).sum(-1).flatten()[index]
    weighted = Term(CrossEntropy(), teacher=None, weights=[Entropy("student", beta=0.1)])
    close(Objective([weighted])(p, {}, trajectories)[0], -(log_prob * (-0.1 * entropy).exp()).mean(), 1e-6)


def test_what_has_no_closed_form_says_so():
    p, q = normals(0)
    for signal in (JSD(), SkewForwardKL()):
        name = type(signal).__name__
        with pytest.raises(TypeError, match=f"{name} between Gaussians has no closed form; use ForwardKL or ReverseKL"):
            evaluate(signal, p, q)
    with pytest.raises(ValueError, match="total variation between Gaussians has a closed form only for equal scales"):
        evaluate(TotalVariation(), p, q)
    with pytest.raises(ValueError, match=r"the α-divergence with alpha=3\.0 between these Gaussians is infinite"):
        evaluate(AlphaDivergence(3.0), Gaussian(p.mean, p.scale * 0 + 1), Gaussian(q.mean, q.scale * 0 + 2))
    for signal in (ReverseKL(Support("teacher", 2)), ReverseKL(temperature=2.0), ReverseKL(clip=1.0)):
        with pytest.raises(TypeError, match="support, temperature and clip belong to a vocabulary"):
            evaluate(signal, p, q)


def test_log_prob_and_entropy_of_a_standard_normal():
    p = Gaussian(torch.zeros(3, 2), torch.tensor(1.0))
    close(p.log_prob(torch.zeros(3, 2)), torch.full((3,), -math.log(2 * math.pi)), 1e-6)
    close(p.entropy(), torch.full((3,), math.log(2 * math.pi * math.e)), 1e-6)


@pytest.mark.parametrize("signal", [JSD(), SkewForwardKL(), ForwardKL(temperature=2.0), ReverseKL(clip=1.0)])
def test_what_has_no_gaussian_form_is_refused_when_the_objective_is_checked(signal):
    with pytest.raises(ValueError, match="needs 'categorical': only distributions over a vocabulary have it"):
        Objective([Term(signal)]).check({"teacher"}, {"behavior"}, {"student"})
    Objective([Term(ForwardKL())]).check({"teacher"}, {"behavior"}, {"student"})
