"""Term: one summand of the objective.

Shape legend: N trained steps of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..finite import Finite
from .signal import Part, Scope, Signal
from .steps import OpenSteps, Steps
from .target import Target
from .weight import Weight

Normalizer = Literal["steps", "on", "trajectories", "weights"]


@dataclass
class Term:
    """One summand of the objective.

    Args:
        signal: loss of a step.
        teacher: an entry of ``model.teachers``; None for signals that ask no teacher.
        weights: multiplied with each other.
        target: turns the teacher's distribution into another one first.
        source: only trajectories of this behavior policy (``student``, ``dataset`` or a teacher's name); None: all.
        coefficient: c, a public knob; at 0 the term and its teacher's forward pass are skipped.
        normalizer: Z, a sum over the optimizer step and all ranks, in which steps where the term is off (another
            source, no view, no reward) weigh 0. ``steps``: all trained steps, also where the term is off, but for a
            term that reads rewards those of rows whose reward abstains. ``on``: the trained steps where it is on
            (SDPO's mean over masked tokens, 2601.20802). ``trajectories``: the trajectories where it is on, each step
            counting 1/T of its trajectory's T: the mean of per-trajectory means (1/len in GRPO, OPSD, f-OPD).
            ``weights``: the sum of this term's weights.
        name: in logs; default: the signal's class name.
    """

    signal: Signal
    teacher: str | None = "teacher"
    weights: list[Weight] = field(default_factory=list)
    target: Target | None = None
    source: str | None = None
    coefficient: float = 1.0
    normalizer: Normalizer = "steps"
    name: str = ""

    __setattr__ = Finite.__setattr__

    def parts(self) -> list[Part]:
        """Lists the signal, what that asks for, such as an advantage, and the weights."""
        return [self.signal, *self.signal.inputs.values(), *self.weights]

    def weights_of(self, *scopes: Scope) -> list[Weight]:
        """Selects its weights of these scopes."""
        return [weight for weight in self.weights if weight.scope in scopes]

    @property
    def needs(self) -> set[str]:
        return set().union(*(part.needs for part in self.parts()))

    @property
    def stream(self) -> str | None:
        """Name of the stream that the term compares with: its teacher, or its target's result."""
        return self.teacher if self.target is None else f"{self.teacher} as {self.name}'s target"

    @property
    def compared(self) -> set[str]:
        """Teachers without which the term is off: its own, and those of its target."""
        teacher = {self.teacher} if self.teacher is not None and "teacher" in self.needs else set()
        return teacher | set(self.target.streams if self.target else ())

    @property
    def teachers(self) -> set[str]:
        """Names whose forward pass the term needs: those that it compares with, and those that its parts read."""
        return self.compared.union(*(part.streams for part in self.parts()))

    def whole(self, part: Part) -> set[str]:
        """Names the teachers of which a part reads more than how likely the action was, and the likeliest ones."""
        is_whole = "distribution" in part.needs or bool(part.layers) or self.target is not None
        own = self.compared if is_whole else set()
        reads = [name.split("/") for name in part.reads]
        others = {stream for stream, what in reads if what != "log_prob"} - {"student"}
        return own | (others - {"teacher"}) | (self.compared if "teacher" in others else set())

    def check_told(self, where: str, part: Part, top_k: Mapping[str, int]) -> None:
        """Refuses a part that reads more of a teacher than that tells.

        Args:
            where: the term is, for the message.
            part: one of its own.
            top_k: of teachers that tell no distributions, how many of the likeliest actions of a state they tell.

        Raises:
            ValueError: with what such a teacher serves.
        """
        name = type(part).__name__
        likeliest = {k: f" and of the {count} likeliest ones" if count else " alone" for k, count in top_k.items()}
        for teacher in sorted(top_k.keys() & self.whole(part)):
            who = f"term {self.name}'s target" if self.target is not None else name
            raise ValueError(
                f"{where}: {who} needs the whole distribution of model.teachers.{teacher}, which tells log-probs of "
                f"the action{likeliest[teacher]}. Those serve PolicyGradient with LogRatio, and divergences with the "
                "support {of: sampled} or, where likeliest ones are told, {of: teacher, k: …}"
            )
        for teacher in sorted(top_k.keys() & self.compared):
            if part.top_k > top_k[teacher]:
                raise ValueError(
                    f"{where}: {name} reads the {part.top_k} likeliest actions of model.teachers.{teacher}, which "
                    f"tells log-probs of the action{likeliest[teacher]}"
                )

    def needs_of(self, part: Part, aligned: Container[str]) -> frozenset[str]:
        """Lists what a part needs of the run, besides a teacher.

        Args:
            part: one of its own.
            aligned: teachers of another tokenizer, which share log-probs out by those of acting.
        """
        shared = self.teacher in aligned and "teacher" in part.needs and "other_tokenizer" not in part.needs
        of_run = part.needs - {"teacher", "distribution", "other_tokenizer"}
        return of_run | {"behavior"} if shared else of_run

    def check_aligned(self, where: str, part: Part, aligned: Mapping[str, bool]) -> None:
        """Refuses a part that reads distributions over the teacher's own vocabulary, of a teacher that tells none.

        Args:
            where: the term is, for the message.
            part: one of its own.
            aligned: teachers of another tokenizer, and whether they tell their own distributions.

        Raises:
            ValueError: with what such a teacher is.
        """
        if "other_tokenizer" in part.needs and self.target is not None:
            raise ValueError(f"{where}.target: {type(part).__name__} compares two vocabularies; a target has one")
        if "other_tokenizer" in part.needs and self.teacher is not None and self.teacher not in aligned:
            raise ValueError(
                f"{where}: {type(part).__name__} compares the student with a teacher's own vocabulary; the weights of "
                f"model.teachers.{self.teacher} have to be OtherTokenizer"
            )
        if "other_tokenizer" in part.needs and self.teacher is not None and not aligned[self.teacher]:
            raise ValueError(
                f"{where}: {type(part).__name__} compares the student with a teacher's own vocabulary, and the server "
                f"of model.teachers.{self.teacher} tells log-probs of the text alone; `opd serve-teacher` tells hidden "
                "states, too: server.dialect: opd and server.hidden: true"
            )

    def channel(self, part: Part) -> str:
        """Names the channel that keeps the values of one of its parts of scope ``generation``."""
        settled = [candidate for candidate in self.parts() if candidate.scope == "generation"]
        index = next(i for i, candidate in enumerate(settled) if candidate is part)
        return f"{self.name}/{type(part).__name__}" + (f"_{index + 1}" if index else "")

    def value(self, part: Part, steps: Steps) -> Tensor:
        """Evaluates one of its weights, or of its signal's inputs: ``[N]``, without gradient."""
        if part.scope == "generation":
            # a term that is turned on in the middle of a generation batch begins with the next
            settled = self.channel(part) in steps.trajectories.channels
            return steps.channel(self.channel(part)) if settled else steps.index.new_zeros(len(steps)).float()
        return part(steps.for_stream(self.stream)).detach()

    def on(self, steps: Steps) -> Tensor:
        """Returns the steps where the term applies at all, ``[N]`` bool."""
        on = torch.ones(len(steps), dtype=torch.bool, device=steps.index.device)
        for name in self.compared:
            on &= steps.knows(name)
        if self.source is not None:
            sources = steps.trajectories.sources  # a callback may let it act now and then
            place = sources.index(self.source) if self.source in sources else -1
            on &= steps.per_trajectory(steps.trajectories.source == place)
        if "reward" in self.needs and steps.abstained is not None:
            on &= ~steps.per_trajectory(steps.abstained)
        return on

    def counts(self, steps: Steps) -> Tensor:
        """Returns each step's factor ``[N]`` before any weight.

        0 where the term is off, the trajectory's weight elsewhere; for the normalizer ``trajectories`` divided by the
        trajectory's T steps.
        """
        counts = self.on(steps).float()
        if steps.trajectories.weight is not None:
            counts = counts * steps.per_trajectory(steps.trajectories.weight)
        if self.normalizer == "trajectories":
            counts = counts / steps.per_trajectory(steps.trajectories.length.clamp(min=1))
        return counts

    def known(self, steps: Steps) -> Tensor:
        """Multiplies `counts` ``[N]`` with the weights that are known before a forward pass."""
        counts = self.counts(steps)
        for weight in self.weights_of("data", "generation"):
            counts = weighed(counts, self.value(weight, steps))
        return counts

    @property
    def sums_distributions(self) -> bool:
        """True where Z is known only after a forward pass over the whole optimizer step."""
        return self.normalizer == "weights" and bool(self.weights_of("step", "row"))

    def seen(self, chunk: OpenSteps) -> OpenSteps:
        """Adds the target to an open chunk, if the term compares with a teacher."""
        target = None
        if self.compared:
            assert self.teacher is not None
            target = chunk.streams[self.teacher]
            if self.target is not None:  # which `check` keeps from what is only told
                streams: dict[str, Any] = {**chunk.streams, "teacher": target, "student": chunk.student}
                target = self.target(streams)
        return chunk.for_term(self.stream, target)

    def measured(self, chunk: OpenSteps, name: str) -> Tensor:
        """Returns a statistic ``[n]`` that one of its parts reads; only ``teacher/…`` needs the target."""
        return (self.seen(chunk) if name.startswith("teacher/") else chunk).statistic(name)


def weighed(factor: Tensor, weight: Tensor) -> Tensor:
    """Multiplies a factor ``[N]`` with a weight; 0 stays 0, whatever the weight is where the term is off."""
    return torch.where(factor != 0, factor * weight, 0.0)
