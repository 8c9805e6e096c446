"""Distributions over the next step: `Categorical` (hidden states, a head), `Gaussian`, `Lazy`, `Scored`, `Aligned`."""

from .aligned import Aligned, AlignedChunk
from .base import Distribution, GradientAccumulator
from .categorical import Categorical
from .chunk import CategoricalChunk
from .gaussian import Gaussian, gaussian_kl
from .head import IMPOSSIBLE, Head
from .lazy import Lazy
from .scored import Scored, ScoredChunk
from .stream import Stream

__all__ = [
    "IMPOSSIBLE",
    "Aligned",
    "AlignedChunk",
    "Categorical",
    "CategoricalChunk",
    "Distribution",
    "Gaussian",
    "GradientAccumulator",
    "Head",
    "Lazy",
    "Scored",
    "ScoredChunk",
    "Stream",
    "gaussian_kl",
]
