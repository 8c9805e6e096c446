"""Settings: each implements the four methods of `OnPolicyDistillation`."""

from .diffusion import DiffusionDistillation
from .gui_grounding import GUIGroundingDistillation
from .text import TextDistillation
from .vision_language import VisionLanguageDistillation

__all__ = ["DiffusionDistillation", "GUIGroundingDistillation", "TextDistillation", "VisionLanguageDistillation"]
