"""Distributions over the next step: `Categorical` (hidden states and a head), `Gaussian` or `Lazy` normals."""

from .base import Distribution, GradientAccumulator
from .categorical import Categorical
from .chunk import CategoricalChunk
from .gaussian import Gaussian, gaussian_kl
from .head import IMPOSSIBLE, Head
from .lazy import Lazy
from .stream import Stream

__all__ = [
    "IMPOSSIBLE",
    "Categorical",
    "CategoricalChunk",
    "Distribution",
    "Gaussian",
    "GradientAccumulator",
    "Head",
    "Lazy",
    "Stream",
    "gaussian_kl",
]
