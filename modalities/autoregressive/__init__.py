"""What settings whose students write tokens share: rollout engines, replay, views and the audit."""

from .calculator import Calculator
from .checklist import Checklist
from .elsewhere import Cached, OtherTokenizer, Remote
from .endpoint_texts import EndpointTexts
from .engines import DecodeLoop, Generate, RolloutEngine, VllmServer
from .judge import Judge
from .notes import Feedback, Peers, Written
from .setting import AutoregressiveDistillation
from .spans import AgainstReference, Annotator, Span, Spans
from .tools import Tools
from .view import FirstOf, PromptView, TemplateOptions

__all__ = [
    "AgainstReference",
    "Annotator",
    "AutoregressiveDistillation",
    "Cached",
    "Calculator",
    "Checklist",
    "DecodeLoop",
    "EndpointTexts",
    "Feedback",
    "FirstOf",
    "Generate",
    "Judge",
    "OtherTokenizer",
    "Peers",
    "PromptView",
    "Remote",
    "RolloutEngine",
    "Span",
    "Spans",
    "TemplateOptions",
    "Tools",
    "VllmServer",
    "Written",
]
