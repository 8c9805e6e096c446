"""What settings whose students write tokens share: rollout engines, replay, views and the audit."""

from .engines import DecodeLoop, Generate, RolloutEngine, VllmServer
from .setting import AutoregressiveDistillation
from .view import PromptView, TemplateOptions

__all__ = [
    "AutoregressiveDistillation",
    "DecodeLoop",
    "Generate",
    "PromptView",
    "RolloutEngine",
    "TemplateOptions",
    "VllmServer",
]
