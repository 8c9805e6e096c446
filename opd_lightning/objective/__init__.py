"""The objective: terms of signal × weights × target × teacher, evaluated chunk by chunk."""

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
from .objective import LossOutput, Objective, Term, availability
from .policy_gradient import (
    Advantage,
    GroupRelative,
    LogRatio,
    PolicyGradient,
    RewardPlusLogRatio,
    RewardTimesLogRatio,
)
from .signal import CrossEntropy, Part, Signal
from .steps import Steps
from .support import Support
from .target import LogLinear, Target
from .weight import (
    ByReward,
    Confidence,
    Constant,
    Entropy,
    ImportanceRatio,
    Outcome,
    PassRate,
    TopEntropy,
    Weight,
    Window,
)

__all__ = [
    "JSD",
    "Advantage",
    "AlphaDivergence",
    "ByReward",
    "Confidence",
    "Constant",
    "CrossEntropy",
    "Divergence",
    "Entropy",
    "ForwardKL",
    "GroupRelative",
    "ImportanceRatio",
    "LogLinear",
    "LogRatio",
    "LossOutput",
    "Objective",
    "Outcome",
    "Part",
    "PassRate",
    "PolicyGradient",
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
    "Weight",
    "Window",
    "availability",
]
