"""Few-step diffusion: flow-matching models, distilled on the states that their own sampler visits."""

from .families import AnyFlow, Family, Flux, StableDiffusion3, ZImage
from .learned_score import LearnedScore
from .quality import DigitFeatures, Features, Inception, SampleQuality
from .reward import Brightness, ClipScore
from .sampler import SDE, Euler, Noising, Renoise, Sampler, Shortcuts
from .setting import DiffusionDistillation
from .signal import FlowMatching, InverseError, NoiseLevel, VelocityMatching
from .velocity_target import AverageVelocity, ScoreDifference, StepVelocity, TotalDerivative, Velocity, VelocityTarget
from .view import DetailedPrompt, ReferenceImage

__all__ = [
    "SDE",
    "AnyFlow",
    "AverageVelocity",
    "Brightness",
    "ClipScore",
    "DetailedPrompt",
    "DiffusionDistillation",
    "DigitFeatures",
    "Euler",
    "Family",
    "Features",
    "FlowMatching",
    "Flux",
    "Inception",
    "InverseError",
    "LearnedScore",
    "NoiseLevel",
    "Noising",
    "ReferenceImage",
    "Renoise",
    "SampleQuality",
    "Sampler",
    "ScoreDifference",
    "Shortcuts",
    "StableDiffusion3",
    "StepVelocity",
    "TotalDerivative",
    "Velocity",
    "VelocityMatching",
    "VelocityTarget",
    "ZImage",
]
