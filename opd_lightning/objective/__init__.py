"""The objective: terms of signal × weights × target × teacher, evaluated chunk by chunk."""

from .advantage import (
    Advantage,
    GroupRelative,
    LogRatio,
    RewardPlusLogRatio,
    RewardTimesLogRatio,
    TurnRelative,
    turn_rewards,
)
from .divergence import (
    JSD,
    AlphaDivergence,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from .generation import Generation
from .hidden import HiddenMatch
from .loss_pass import availability
from .objective import LossOutput, Objective, Queried
from .policy_gradient import PolicyGradient
from .signal import CrossEntropy, Part, Signal
from .steps import STATISTICS, OpenSteps, Steps
from .support import Support
from .target import LogLinear, Target
from .term import Term
from .weight import (
    ByReward,
    Confidence,
    Constant,
    Entropy,
    ImportanceRatio,
    Length,
    MeanOne,
    Outcome,
    PassRate,
    TopEntropy,
    TurnMean,
    Turns,
    Weight,
    Window,
)

__all__ = [
    "JSD",
    "STATISTICS",
    "Advantage",
    "AlphaDivergence",
    "ByReward",
    "Confidence",
    "Constant",
    "CrossEntropy",
    "Divergence",
    "Entropy",
    "ForwardKL",
    "Generation",
    "GroupRelative",
    "HiddenMatch",
    "ImportanceRatio",
    "Length",
    "LogLinear",
    "LogRatio",
    "LossOutput",
    "MeanOne",
    "Objective",
    "OpenSteps",
    "Outcome",
    "Part",
    "PassRate",
    "PolicyGradient",
    "Queried",
    "ReverseKL",
    "RewardPlusLogRatio",
    "RewardTimesLogRatio",
    "Signal",
    "SkewForwardKL",
    "SkewReverseKL",
    "Steps",
    "Support",
    "Target",
    "Term",
    "TopEntropy",
    "TotalVariation",
    "TurnMean",
    "TurnRelative",
    "Turns",
    "Weight",
    "Window",
    "availability",
    "turn_rewards",
]
