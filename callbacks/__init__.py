"""Callbacks: knobs over training time."""

from .curriculum import Cosine, Curriculum, Linear, OnPlateau, Piecewise, Schedule, Stage, Staircase
from .knobs import KnobCallback

__all__ = [
    "Cosine",
    "Curriculum",
    "KnobCallback",
    "Linear",
    "OnPlateau",
    "Piecewise",
    "Schedule",
    "Stage",
    "Staircase",
]
