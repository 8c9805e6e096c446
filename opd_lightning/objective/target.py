"""Targets: functions of a teacher's distribution, with whose result the signal compares the student."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..distribution import IMPOSSIBLE, CategoricalChunk, Gaussian
from ..finite import Finite


class Target(Finite, ABC):
    """Function of named streams.

    Attributes:
        streams: teachers that it reads beside the term's own ("teacher").
    """

    streams: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, streams: dict[str, CategoricalChunk | Gaussian]) -> CategoricalChunk | Gaussian:
        """Returns the distribution to compare with at the n states of the open chunk, without gradient."""


class LogLinear(Target):
    """Log-linear mixture log q′ = Σ aᵢ·log qᵢ, normalized: logit algebra over streams.

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
        teacher = streams["teacher"]
        with torch.no_grad():
            if isinstance(teacher, Gaussian):
                return self._gaussian([(a, streams[name]) for name, a in self.coefficients.items()])
            total: Tensor | None = None
            for name, a in self.coefficients.items():
                scaled = a * streams[name].log_probs()  # type: ignore[union-attr]
                total = scaled if total is None else total.add_(scaled)
            assert total is not None
            # a negative coefficient would turn what the teacher rules out into a certainty
            return CategoricalChunk(total.masked_fill_(teacher.log_probs() <= IMPOSSIBLE / 2, IMPOSSIBLE))

    def _gaussian(self, streams: list[tuple[float, CategoricalChunk | Gaussian]]) -> Gaussian:
        # a product of powers of normals is normal: precisions add up, and means weighted by them
        precision: Tensor | float = 0.0
        weighted: Tensor | float = 0.0
        for a, stream in streams:
            assert isinstance(stream, Gaussian)
            precision = precision + a / stream.scale.square()
            weighted = weighted + a * stream.mean / stream.scale.square()
        assert isinstance(precision, Tensor)
        if bool((precision <= 0).any()):
            raise ValueError("target.coefficients: the combined Gaussian has no positive precision")
        return Gaussian(weighted / precision, precision.rsqrt())
