"""The vision-language setting."""

from .data import ImageData
from .setting import VisionLanguageDistillation
from .view import Blur, ColumnImages, Compose, Crop, Cue, Downscale, HighResolution, MaskRegion, Mixture, Resize

__all__ = [
    "Blur",
    "ColumnImages",
    "Compose",
    "Crop",
    "Cue",
    "Downscale",
    "HighResolution",
    "ImageData",
    "MaskRegion",
    "Mixture",
    "Resize",
    "VisionLanguageDistillation",
]
