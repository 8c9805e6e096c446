"""Rollouts that end early: where, and how much of them is trained.

Shape legend: B trajectories, T steps (padded), n trained steps of one trajectory.
"""

from .adaptive_window import AdaptiveWindow
from .callback import EarlyStopRollout
from .change_point import ChangePoint
from .low_correction import LowCorrection
from .rule import FirstSteps, StopRule

__all__ = ["AdaptiveWindow", "ChangePoint", "EarlyStopRollout", "FirstSteps", "LowCorrection", "StopRule"]
