"""What settings whose students write tokens share: rollout engines, replay, views and the audit."""

from .engines import DecodeLoop, Generate, RolloutEngine, VllmServer
from .notes import Feedback, Peers, Written
from .setting import AutoregressiveDistillation
from .view import FirstOf, PromptView, TemplateOptions

__all__ = [
    "AutoregressiveDistillation",
    "DecodeLoop",
    "Feedback",
    "FirstOf",
    "Generate",
    "Peers",
    "PromptView",
    "RolloutEngine",
    "TemplateOptions",
    "VllmServer",
    "Written",
]
