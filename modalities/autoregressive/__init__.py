"""What settings whose students write tokens share: rollout engines, replay, views and the audit."""

from .decode import DecodeLoop
from .engine import Generate, RolloutEngine
from .setting import AutoregressiveDistillation
from .view import PromptView
from .vllm import VllmServer

__all__ = ["AutoregressiveDistillation", "DecodeLoop", "Generate", "PromptView", "RolloutEngine", "VllmServer"]
