"""Signals: the loss of one step. Shape legend: n steps of a chunk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

from torch import Tensor

from ..finite import Finite
from .generation import Generation
from .steps import OpenSteps

Scope = Literal["data", "step", "row", "generation"]
ADVICE = {
    "reward": "set model.reward (a setting whose `rewards` has rewards of its own names it in `provides`)",
    "group": "set rollout.group_size > 1",
    "behavior": "dataset completions have no behavior log-probs: give the term `source: student`",
    "categorical": "only distributions over a vocabulary have it",
    "layers": "only settings whose policies show their hidden states have it",
    "turn": "only settings whose policies write have turns",
    "turn_reward": "set model.environment to one whose turns have rewards (`Environment.rewards`)",
}
"""What provides a need, for the message where nothing does."""


class Part(Finite):
    """Component of a term, with what it needs of the run.

    A part of scope ``generation`` implements `settle`, any other `__call__`.

    Attributes:
        needs: what the run must provide, any of ``teacher``, ``distribution`` (the whole of its teacher's: without this
            word a teacher will do that tells log-probs of actions), ``other_tokenizer`` (that its teacher tells
            distributions over its own vocabulary, as an `Aligned` one), ``reward`` (a reward is configured), ``group``
            (group_size > 1), ``behavior`` (behavior log-probs: not for dataset completions), ``categorical``, or a name
            of a setting's or a callback's `provides`.
        scope: ``data``: reads only the trajectories, so it is known before any model runs. ``step``: its own step.
            ``row``: all steps of the trajectory. ``generation``: the whole generation batch on all ranks, groups
            included; evaluated once, when it is rolled out (`Generation`).
        reads: the statistics that it reads (`Steps.statistic`), such as ``teacher/entropy``; the stream may also be an
            entry of ``model.teachers`` that the part asks for by this, without which the term stays on.
        layers: whose hidden states it reads (``steps.student.layers``): by layer of the student that of the term's
            teacher beside it, or ``all`` of both in order. A part that has some needs ``layers``.
        widths: of hidden states of student and teacher, where it takes others than equal ones.
        top_k: how many of the teacher's likeliest actions it reads of a state, where it needs no ``distribution``.
        advice: what provides a need, for the message where nothing does.
    """

    needs: frozenset[str] = frozenset()
    scope: Scope = "step"
    reads: frozenset[str] = frozenset()
    layers: dict[int, int] | Literal["all"] = {}  # noqa: RUF012  (never written to)
    widths: tuple[int, int] | None = None
    top_k: int = 0
    advice: dict[str, str] = ADVICE

    def __call__(self, steps: Any) -> Tensor:
        """Returns ``[n]`` of an open chunk's `OpenSteps` for the scope ``step``, ``[N]`` for ``data`` and ``row``."""
        raise NotImplementedError(f"{type(self).__name__} has the scope {self.scope}, but no method __call__")

    def settle(self, generation: Generation) -> Tensor:
        """Returns the values ``[B, T]``, on the CPU, of a part of scope ``generation``."""
        raise NotImplementedError(f"{type(self).__name__} has the scope generation, but no method settle")

    def over(self, generation: Generation) -> Tensor:
        """Evaluates it on a whole generation batch, for a part of that scope that is made of it: ``[B, T]``."""
        return self.settle(generation) if self.scope == "generation" else generation.rows(self(generation.steps))

    @property
    def streams(self) -> set[str]:
        """Entries of model.teachers that it reads beside the term's own."""
        return {name.split("/")[0] for name in self.reads} - {"student", "teacher"}


class Signal(Part, ABC):
    """Loss ℓ(p_θ, q) at every step, differentiable in the student."""

    @property
    def inputs(self) -> dict[str, Part]:
        """Parts that are evaluated for it, without gradient, by the name that it reads them by in ``steps.inputs``."""
        return {}

    @abstractmethod
    def __call__(self, steps: OpenSteps) -> Tensor:
        """Returns the losses ``[n]``; nothing is reduced, masked or weighted here."""


class CrossEntropy(Signal):
    """Cross-entropy −(1 − p_θ(action))^γ·log p_θ(action); on dataset completions supervised fine-tuning (SFT).

    Args:
        focus: γ of the focal loss (1708.02002): what is likely already counts less. Default 0, the plain cross-entropy;
            OneSearch-V2 (2603.24422) uses 3.

    Raises:
        ValueError: a focus below 0.
    """

    def __init__(self, focus: float = 0.0) -> None:
        if focus < 0:
            raise ValueError(f"signal.focus must be >= 0, got {focus}")
        self.focus = focus
        self.needs = frozenset({"categorical"}) if focus else frozenset()

    def __call__(self, steps: OpenSteps) -> Tensor:
        log_prob = steps.student.log_prob(steps.action)
        if not self.focus:
            return -log_prob
        # at p = 1 a power below 1 would have an infinite slope, times a loss of 0
        doubt = (-log_prob.expm1()).clamp(min=1e-12)
        return -(doubt**self.focus) * log_prob
