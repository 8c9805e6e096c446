"""The text setting."""

from .setting import TextDistillation

__all__ = ["TextDistillation"]
