"""Rollout engines: what writes completions, and how the rows of a model that can't share a pass come apart."""

from .decode_loop import DecodeLoop
from .engine import Prompts, RolloutEngine, Writer
from .generate import Generate
from .vllm import VllmServer

__all__ = ["DecodeLoop", "Generate", "Prompts", "RolloutEngine", "VllmServer", "Writer"]
