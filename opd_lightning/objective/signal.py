"""Signals: what one step contributes to the loss. Shape legend: n steps of a chunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor

from ..finite import Finite
from .steps import Steps

Scope = Literal["data", "step", "row", "batch"]


class Part(Finite):
    """Something a term is made of, and what it asks of those who serve it.

    Attributes:
        needs: any of ``teacher``, ``reward`` (a reward is configured), ``group`` (group_size > 1),
            ``behavior`` (behavior log-probs: not for dataset completions), ``categorical``,
            ``digits`` (a channel of the trajectories that GUI grounding fills), ``latents`` (diffusion).
        scope: ``data``: reads only the trajectories, so it is known before any model runs. ``step``: its own step.
            ``row``: all steps of the trajectory. ``batch``: the whole optimizer step on all ranks.
        reads: the statistics (`steps.STATISTICS`) that it reads; declared so that a wider scope can be served.
    """

    needs: frozenset[str] = frozenset()
    scope: Scope = "step"
    reads: frozenset[str] = frozenset()


class Signal(Part, ABC):
    """ℓ(p_θ, q) at every step, differentiable in the student."""

    @abstractmethod
    def __call__(self, steps: Steps) -> Tensor:
        """``[n]`` losses; nothing is reduced, masked or weighted here."""


class CrossEntropy(Signal):
    """−log p_θ(action): with dataset completions this is supervised fine-tuning (SFT); it asks no teacher."""

    def __call__(self, steps: Steps) -> Tensor:
        assert steps.student is not None
        return -steps.student.log_prob(steps.action)
