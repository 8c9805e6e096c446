"""Targets: what a teacher's distribution is turned into before the signal compares the student with it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..distribution import IMPOSSIBLE, CategoricalChunk, Gaussian
from ..finite import Finite


class Target(Finite, ABC):
    """A function of named streams. ``streams`` lists the teachers it reads beside the term's own ("teacher")."""

    streams: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, streams: dict[str, CategoricalChunk | Gaussian]) -> CategoricalChunk | Gaussian:
        """The distribution to compare with, at the n states of the open chunk, without gradient."""


class LogLinear(Target):
    """log q′ = Σ aᵢ·log qᵢ, normalized: logit algebra over streams.

    Extrapolation past the teacher is ``{teacher: λ, reference: 1 − λ}`` with λ > 1 (G-OPD, 2602.12125, λ = 1.25);
    a trust region around a reference is the same with λ < 1 (SDPO, 2601.20802).

    Args:
        coefficients: aᵢ by stream; ``teacher`` is the term's own teacher, other names are entries of model.teachers,
            and ``student`` is the student itself, detached.
    """

    def __init__(self, coefficients: dict[str, float]) -> None:
        if "teacher" not in coefficients:
            raise ValueError(f"target.coefficients must name 'teacher', got {sorted(coefficients)}")
        self.coefficients = coefficients
        self.streams = tuple(name for name in coefficients if name not in ("teacher", "student"))

    def __call__(self, streams: dict[str, CategoricalChunk | Gaussian]) -> CategoricalChunk | Gaussian:
        own = streams["teacher"]
        with torch.no_grad():
            if isinstance(own, Gaussian):
                return self._gaussian([(a, streams[name]) for name, a in self.coefficients.items()])
            total: Tensor | None = None
            for name, a in self.coefficients.items():
                scaled = a * streams[name].log_probs()  # type: ignore[union-attr]
                total = scaled if total is None else total.add_(scaled)
            assert total is not None
            # a negative coefficient would turn what the teacher rules out into a certainty
            return CategoricalChunk(total.masked_fill_(own.log_probs() <= IMPOSSIBLE / 2, IMPOSSIBLE))

    def _gaussian(self, parts: list[tuple[float, CategoricalChunk | Gaussian]]) -> Gaussian:
        precision: Tensor | float = 0.0
        weighted: Tensor | float = 0.0
        for a, part in parts:
            assert isinstance(part, Gaussian)
            precision = precision + a / part.scale.square()
            weighted = weighted + a * part.mean / part.scale.square()
        assert isinstance(precision, Tensor)
        if bool((precision <= 0).any()):
            raise ValueError("target.coefficients: the combined Gaussian has no positive precision")
        return Gaussian(weighted / precision, precision.rsqrt())
