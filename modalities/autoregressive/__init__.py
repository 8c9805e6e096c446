"""What settings whose students write tokens share: rollout engines, replay, views and the audit."""

from .adapted import Gymnasium, OpenEnv, gymnasium_rows
from .calculator import Calculator
from .checklist import Checklist
from .elsewhere import Cached, OtherTokenizer, Remote
from .endpoint_texts import EndpointTexts
from .engines import DecodeLoop, Generate, RolloutEngine, VllmServer
from .judge import Judge
from .notes import Feedback, Peers, Written
from .scripted_user import ScriptedUser
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
    "Gymnasium",
    "Judge",
    "OpenEnv",
    "OtherTokenizer",
    "Peers",
    "PromptView",
    "Remote",
    "RolloutEngine",
    "ScriptedUser",
    "Span",
    "Spans",
    "TemplateOptions",
    "Tools",
    "VllmServer",
    "Written",
    "gymnasium_rows",
]
