"""Callbacks: what changes while a run trains, and what is watched meanwhile."""

from .curriculum import Cosine, Curriculum, Linear, OnPlateau, Piecewise, Schedule, Stage, Staircase
from .early_stop import AdaptiveWindow, ChangePoint, EarlyStopRollout, FirstSteps, LowCorrection, StopPolicy
from .freshness import Anchor, FreshnessControl
from .knobs import KnobCallback

__all__ = [
    "AdaptiveWindow",
    "Anchor",
    "ChangePoint",
    "Cosine",
    "Curriculum",
    "EarlyStopRollout",
    "FirstSteps",
    "FreshnessControl",
    "KnobCallback",
    "Linear",
    "LowCorrection",
    "OnPlateau",
    "Piecewise",
    "Schedule",
    "Stage",
    "Staircase",
    "StopPolicy",
]
