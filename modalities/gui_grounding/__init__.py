"""GUI grounding."""

from .formats import AbsolutePixels, AnswerFormat, BoxTags, JSONAnswer, Normalized1000, PyAutoGUI, ToolCall
from .miniwob import MiniWoB, miniwob_rows
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
    "MiniWoB",
    "Normalized1000",
    "Overlap",
    "PointInBox",
    "PyAutoGUI",
    "Spotlight",
    "ToolCall",
    "miniwob_rows",
]
