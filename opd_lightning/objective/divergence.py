"""Divergences between student p and teacher q at the same state.

Each is written once per family: over a vocabulary as pointwise contributions of log-probabilities whose sum is the
divergence, and for Gaussians in closed form where there is one. Directions are named by their arguments, since papers
disagree on "forward": forward KL is KL(q‖p), teacher first; reverse KL is KL(p‖q), student first.

Shape legend: n states, K ids of the support (V for the full vocabulary), ... the event of a Gaussian.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..distribution import CategoricalChunk, Gaussian, ScoredChunk, gaussian_kl
from .signal import Signal
from .steps import OpenSteps
from .support import Support


def kl_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Returns a·(log a − log b) ``[n, K]``, whose sum is KL(a‖b)."""
    return log_a.exp() * (log_a - log_b)


def forward_kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns the terms ``[n, K]`` of KL(q‖p) = Σ q·(log q − log p)."""
    return kl_terms(log_q, log_p)


def reverse_kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns the terms ``[n, K]`` of KL(p‖q) = Σ p·(log p − log q)."""
    return kl_terms(log_p, log_q)


def log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Returns log(share·a + (1 − share)·b), elementwise, for 0 < share < 1."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def jsd_terms(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Returns the terms ``[n, K]`` of β·KL(q‖m) + (1−β)·KL(p‖m), m = β·q + (1−β)·p.

    KL(q‖p) at β = 0 and KL(p‖q) at β = 1: the formula itself vanishes at both ends, where JSD/β → KL(q‖p) and
    JSD/(1−β) → KL(p‖q) (GKD, 2306.13649).
    """
    if beta == 0.0:
        return forward_kl_terms(log_p, log_q)
    if beta == 1.0:
        return reverse_kl_terms(log_p, log_q)
    log_m = log_mixture(log_q, log_p, beta)
    return beta * kl_terms(log_q, log_m) + (1 - beta) * kl_terms(log_p, log_m)


def skew_forward_kl_terms(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """Returns the terms ``[n, K]`` of KL(q ‖ α·q + (1−α)·p) (DistiLLM, 2402.03898)."""
    return kl_terms(log_q, log_mixture(log_q, log_p, alpha))


def skew_reverse_kl_terms(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """Returns the terms ``[n, K]`` of KL(p ‖ α·p + (1−α)·q) (DistiLLM, 2402.03898)."""
    return kl_terms(log_p, log_mixture(log_p, log_q, alpha))


def alpha_terms(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """Returns (q^α p^(1−α) − α·q − (1−α)·p) / (α(α−1)) ``[n, K]``, each ≥ 0 (Amari).

    KL(q‖p) at α = 1 and KL(p‖q) at α = 0, the limits.
    """
    if alpha == 1.0:
        return forward_kl_terms(log_p, log_q)
    if alpha == 0.0:
        return reverse_kl_terms(log_p, log_q)
    # the linear terms sum to 1 over the vocabulary and make each contribution ≥ 0, on a truncated support too
    power = (alpha * log_q + (1 - alpha) * log_p).exp()
    return (power - alpha * log_q.exp() - (1 - alpha) * log_p.exp()) / (alpha * (alpha - 1))


def total_variation_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns ½|p − q| ``[n, K]``."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs()


def gaussian_alpha(p: Gaussian, q: Gaussian, alpha: float) -> Tensor:
    """Returns (∫ q^α p^(1−α) − 1) / (α(α−1)) ``[n]``, in closed form.

    Raises:
        ValueError: the integral diverges: α·σ_p² + (1−α)·σ_q² ≤ 0 somewhere (possible outside 0 ≤ α ≤ 1).
    """
    if alpha == 1.0:
        return gaussian_kl(q, p)
    if alpha == 0.0:
        return gaussian_kl(p, q)
    variance = alpha * p.scale.square() + (1 - alpha) * q.scale.square()
    if bool((variance <= 0).any()):
        raise ValueError(f"the α-divergence with alpha={alpha} between these Gaussians is infinite")
    # log ∫ q^α p^(1−α) of two normals, per dimension
    log_power = (
        alpha * p.scale.log()
        + (1 - alpha) * q.scale.log()
        - 0.5 * variance.log()
        - 0.5 * alpha * (1 - alpha) * (p.mean - q.mean).square() / variance
    )
    # expm1 keeps the digits where the two are nearly equal
    return log_power.flatten(1).sum(1).expm1() / (alpha * (alpha - 1))


def gaussian_total_variation(p: Gaussian, q: Gaussian) -> Tensor:
    """Returns erf(‖(μ_p − μ_q)/σ‖ / (2√2)) ``[n]``, for equal scales.

    Raises:
        ValueError: the scales differ (there is no closed form then).
    """
    if not torch.allclose(p.scale, q.scale):
        raise ValueError("total variation between Gaussians has a closed form only for equal scales")
    squared = ((p.mean - q.mean) / q.scale).square().flatten(1).sum(1)
    # √ has an infinite slope at 0, which the chain rule multiplies by 0; kept away from it the gradient there is 0
    return torch.erf(squared.clamp(min=1e-24).sqrt() / (2 * math.sqrt(2)))


FULL = Support()


class Divergence(Signal):
    """A divergence between student and teacher: a loss, never an advantage (it depends on the prefix alone).

    Args:
        support: where it is evaluated (default: full vocabulary).
        temperature: both sides' logits are divided by it, default 1. It is the signal's own and has nothing to do
            with the rollout's; the result is *not* multiplied by its square (set the term's coefficient for that).
        clip: upper bound of each id's contribution before the sum, Σ_v min(·, clip) (OPSD, 2601.18734, which prints
            no value; TRACE, 2605.10194, uses 0.05). None: no bound. A clipped sum may be negative, and clipped ids
            have zero gradient.

    Raises:
        ValueError: temperature or clip not positive; a support that is another divergence's.
    """

    needs: frozenset[str] = frozenset({"teacher", "distribution"})
    # also of a subclass whose own __init__ doesn't call this one
    support: Support = FULL
    temperature: float = 1.0
    clip: float | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Adds the need ``categorical`` where there is no closed form between Gaussians."""
        super().__init_subclass__(**kwargs)
        if isinstance(cls.needs, property):
            return
        if cls.gaussian is Divergence.gaussian:
            cls.needs = cls.needs | {"categorical"}
        elif "gaussian" in vars(cls) and "needs" not in vars(cls):  # the class that it extends may have none
            cls.needs = cls.needs - {"categorical"}

    def __init__(self, support: Support = FULL, temperature: float = 1.0, clip: float | None = None) -> None:
        if temperature <= 0:
            raise ValueError(f"signal.temperature must be > 0, got {temperature}")
        if clip is not None and clip <= 0:
            raise ValueError(f"signal.clip must be > 0, got {clip}")
        self.support, self.temperature, self.clip = support, temperature, clip
        if support.remainder == "stop" and not isinstance(self, ReverseKL):
            raise ValueError(
                f"signal.support.remainder: stop leaves the reverse KL's log p without gradient; {type(self).__name__} "
                "is no ReverseKL"
            )
        if support != FULL or temperature != 1 or clip is not None:  # Gaussians take none of them
            self.needs = self.needs | {"categorical"}
        if support.of in ("teacher", "sampled") and temperature == 1:  # what else there is makes one bucket
            self.needs, self.top_k = self.needs - {"distribution"}, support.k or 0

    @abstractmethod
    def categorical(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Returns the contribution ``[n, K]`` of each id; their sum is the divergence."""

    def with_gradient(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sum of the contributions ``[n]`` and its gradient in the student's logits ``[n, V]``.

        At temperature 1. This one uses autograd; divergences with a written gradient spare tensors of this size.
        Arguments are to be read only.
        """
        with torch.enable_grad():
            leaf = log_p.detach().requires_grad_()
            value = self._sum(self.categorical(leaf, log_q))
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        # log p = logits − log Σ exp(logits): the normalizer takes p times the sum of the slopes away
        return value.detach(), slope.addcmul_(p, slope.sum(-1, keepdim=True), value=-1.0)

    def _sum(self, terms: Tensor) -> Tensor:
        return (terms if self.clip is None else terms.clamp(max=self.clip)).sum(-1)

    def gaussian(self, p: Gaussian, q: Gaussian) -> Tensor:
        """Returns the divergence ``[n]`` between normals in closed form.

        Raises:
            TypeError: there is none.
        """
        raise TypeError(f"{type(self).__name__} between Gaussians has no closed form; use ForwardKL or ReverseKL")

    def __call__(self, steps: OpenSteps) -> Tensor:
        if isinstance(steps.student, Gaussian):
            if self.support != FULL or self.temperature != 1 or self.clip is not None:
                raise TypeError("support, temperature and clip belong to a vocabulary; Gaussians take none of them")
            return self.gaussian(steps.student, steps.teacher)
        assert isinstance(steps.student, CategoricalChunk)
        scored = isinstance(steps.teacher, ScoredChunk)
        if self.support.is_full(steps.student.logits.shape[-1]) and not scored:
            value: Tensor = _OverVocabulary.apply(steps.student.logits, self, steps.student, steps.teacher)
            return value
        # `log_probs` says why where more is read than is told
        is_coarse = scored and "distribution" not in self.needs
        log_q = steps.teacher.coarse() if is_coarse else steps.teacher.log_probs(self.temperature)
        log_p, log_q = self.support.restrict(steps.student.log_probs(self.temperature), log_q, steps.action)
        return self._sum(self.categorical(log_p, log_q))


class _OverVocabulary(torch.autograd.Function):
    """Divergence ``[n]`` over the full vocabulary; its gradient is computed beside the value."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, divergence: Divergence, student: CategoricalChunk, teacher: CategoricalChunk
    ) -> Tensor:
        (log_p, p), (log_q, q) = (policy.known(divergence.temperature) for policy in (student, teacher))
        evaluate = divergence.with_gradient
        if divergence.clip is not None:  # the written gradients know no bound
            evaluate = partial(Divergence.with_gradient, divergence)
        value, ctx.gradient = evaluate(log_p, log_q, p, q)
        ctx.temperature = divergence.temperature
        return value

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the divergence's gradient was already consumed by an earlier backward pass")
        # it is that in the logits / temperature
        return gradient.mul_(outputs[0][:, None] / ctx.temperature), None, None, None


class ForwardKL(Divergence):
    """KL(q‖p), teacher first: covers the teacher's modes. Gradient in the student's logits: p − q."""

    def with_gradient(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        # one tensor [n, V] for contributions and gradient
        scratch = (log_q - log_p).mul_(q)
        return scratch.sum(-1), torch.sub(p, q, out=scratch)

    def categorical(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return forward_kl_terms(log_p, log_q)

    def gaussian(self, p: Gaussian, q: Gaussian) -> Tensor:
        return gaussian_kl(q, p)


class ReverseKL(Divergence):
    """KL(p‖q), student first: seeks the teacher's modes."""

    def with_gradient(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        # the slope is p·(log p − log q) + p; what the last p adds, the normalizer takes away
        terms = (log_p - log_q).mul_(p)
        value = terms.sum(-1)
        return value, terms.addcmul_(p, value[:, None], value=-1.0)

    def categorical(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if self.support.remainder == "stop":
            return log_p.exp() * (log_p.detach() - log_q)
        return reverse_kl_terms(log_p, log_q)

    def gaussian(self, p: Gaussian, q: Gaussian) -> Tensor:
        return gaussian_kl(p, q)


class JSD(Divergence):
    """Generalized Jensen–Shannon divergence, `jsd_terms` (GKD, 2306.13649).

    Args:
        beta: the teacher's share of the mixture, in [0, 1]; 0 is KL(q‖p), 1 is KL(p‖q). Default 0.5 (TRL's GKD).
    """

    def __init__(
        self,
        beta: float = 0.5,
        support: Support = FULL,
        temperature: float = 1.0,
        clip: float | None = None,
    ) -> None:
        super().__init__(support, temperature, clip)
        if not 0 <= beta <= 1:
            raise ValueError(f"signal.beta must be in [0, 1], got {beta}")
        self.beta = beta

    def categorical(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return jsd_terms(log_p, log_q, self.beta)

    def with_gradient(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        if self.beta in (0.0, 1.0):
            end = ForwardKL() if self.beta == 0.0 else ReverseKL()
            return end.with_gradient(log_p, log_q, p, q)
        tiny = torch.finfo(p.dtype).tiny  # where both are 0 the contributions are 0 × a finite number
        log_m = (p * (1 - self.beta)).add_(q, alpha=self.beta).clamp_(min=tiny).log_()
        terms = (log_p - log_m).mul_(p).mul_(1 - self.beta)
        student_part = terms.sum(-1)
        value = student_part + torch.sub(log_q, log_m, out=log_m).mul_(q).sum(-1) * self.beta
        # derivatives of p·log p and of both log m cancel: p·(1 − ((1−β)·p + β·q)/m) = 0
        return value, terms.addcmul_(p, student_part[:, None], value=-1.0)


class _Skewed(Divergence):
    """KL against a mixture of both sides.

    Args:
        alpha: share of the first argument mixed into the second, in (0, 1). Default 0.1 (DistiLLM, 2402.03898).
    """

    def __init__(
        self,
        alpha: float = 0.1,
        support: Support = FULL,
        temperature: float = 1.0,
        clip: float | None = None,
    ) -> None:
        super().__init__(support, temperature, clip)
        if not 0 < alpha < 1:
            raise ValueError(f"signal.alpha must be in (0, 1), got {alpha}; the plain KL is its own class")
        self.alpha = alpha


class SkewForwardKL(_Skewed):
    """KL(q ‖ α·q + (1−α)·p), `skew_forward_kl_terms`: bounded by −log α."""

    def categorical(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return skew_forward_kl_terms(log_p, log_q, self.alpha)


class SkewReverseKL(_Skewed):
    """KL(p ‖ α·p + (1−α)·q), `skew_reverse_kl_terms`: bounded by −log α."""

    def categorical(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return skew_reverse_kl_terms(log_p, log_q, self.alpha)


class AlphaDivergence(Divergence):
    """Amari's α-divergence, `alpha_terms`: KL(p‖q) at α = 0, KL(q‖p) at α = 1, 4·(1 − Σ√(pq)) at the default ½."""

    def __init__(
        self,
        alpha: float = 0.5,
        support: Support = FULL,
        temperature: float = 1.0,
        clip: float | None = None,
    ) -> None:
        super().__init__(support, temperature, clip)
        self.alpha = alpha

    def categorical(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return alpha_terms(log_p, log_q, self.alpha)

    def gaussian(self, p: Gaussian, q: Gaussian) -> Tensor:
        return gaussian_alpha(p, q, self.alpha)


class TotalVariation(Divergence):
    """Total variation ½·Σ|p − q|, in [0, 1]."""

    def categorical(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return total_variation_terms(log_p, log_q)

    def gaussian(self, p: Gaussian, q: Gaussian) -> Tensor:
        return gaussian_total_variation(p, q)
