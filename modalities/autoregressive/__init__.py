"""What settings whose students write tokens share: sampling, replay, views and the audit."""

from .setting import AutoregressiveDistillation
from .view import PromptView

__all__ = ["AutoregressiveDistillation", "PromptView"]
