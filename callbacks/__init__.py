"""Callbacks: what changes while a run trains, and what is watched meanwhile."""

from ..callback import DistillationCallback, Stateful
from ..retention import Retention
from .collapse_alarm import CollapseAlarm
from .curriculum import Cosine, Curriculum, Linear, OnPlateau, Piecewise, Schedule, Stage, Staircase
from .early_stop import AdaptiveWindow, ChangePoint, EarlyStopRollout, FirstSteps, LowCorrection, StopRule
from .freshness import Anchor, FreshnessControl
from .hidden_similarity import HiddenSimilarity
from .knobs import KnobCallback
from .lm_eval import LMEval
from .loss_spikes import LossSpikes
from .note_gaps import NoteGaps
from .samples import Samples
from .teacher_sync import Average, Every, Never, SyncRule, TeacherSync, WhenConsolidated
from .weight_average import WeightAverage
from .weight_extrapolation import WeightExtrapolation

__all__ = [
    "AdaptiveWindow",
    "Anchor",
    "Average",
    "ChangePoint",
    "CollapseAlarm",
    "Cosine",
    "Curriculum",
    "DistillationCallback",
    "EarlyStopRollout",
    "Every",
    "FirstSteps",
    "FreshnessControl",
    "HiddenSimilarity",
    "KnobCallback",
    "LMEval",
    "Linear",
    "LossSpikes",
    "LowCorrection",
    "Never",
    "NoteGaps",
    "OnPlateau",
    "Piecewise",
    "Retention",
    "Samples",
    "Schedule",
    "Stage",
    "Staircase",
    "Stateful",
    "StopRule",
    "SyncRule",
    "TeacherSync",
    "WeightAverage",
    "WeightExtrapolation",
    "WhenConsolidated",
]
