"""Settings: each implements the four methods of `OnPolicyDistillation`."""

from .text import TextDistillation

__all__ = ["TextDistillation"]
