"""GUI grounding."""

from .formats import AbsolutePixels, AnswerFormat, BoxTags, JSONAnswer, Normalized1000, PyAutoGUI, ToolCall
from .reward import Overlap, PointInBox
from .setting import GUIGroundingDistillation
from .view import BoxOnly, CoordinatesAsText, CropZoom, Spotlight
from .weight import DigitSignificance

__all__ = [
    "AbsolutePixels",
    "AnswerFormat",
    "BoxOnly",
    "BoxTags",
    "CoordinatesAsText",
    "CropZoom",
    "DigitSignificance",
    "GUIGroundingDistillation",
    "JSONAnswer",
    "Normalized1000",
    "Overlap",
    "PointInBox",
    "PyAutoGUI",
    "Spotlight",
    "ToolCall",
]
