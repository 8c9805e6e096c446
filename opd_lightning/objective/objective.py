"""Objective: a sum of terms.

    L(θ) = Σ_k c_k · (1/Z_k) Σ_{i,t} m_it · w_k(i,t) · ℓ_k( p_θ(·|s_it), q_k(·|v_k(s_it)) )

`LossPass` evaluates it on one micro-batch. Shape legend: B trajectories, T steps, N trained steps of a micro-batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..diagnostics import Averages
from ..distribution import Distribution, Stream
from ..finite import Finite
from ..printable import quoted
from ..trajectory import Trajectories
from .chunks import Chunks, ChunkSize
from .diagnostics import chunk_diagnostics
from .generation import Generation
from .loss_pass import LossPass, availability
from .signal import Part
from .steps import OpenSteps, Steps, statistic_key
from .term import Term

Queried = tuple[Distribution, dict[str, Stream], Trajectories]
"""A micro-batch with the student's and the teachers' distributions at its B × T states."""


class LossOutput(NamedTuple):
    """Loss of a micro-batch, its share of the optimizer step's, and metrics for the log."""

    loss: Tensor
    metrics: Averages


@dataclass
class Objective:
    """Sum of terms.

    Args:
        terms: summed.
        chunk_mib: memory for one chunk's logits and what is computed from them, in MiB; decides the chunk's size
            (docs/performance.md has measurements). A GPU with memory to spare wants larger chunks.
        chunk_steps: the chunk's size itself, in steps; overrides ``chunk_mib``.
    """

    terms: list[Term]
    chunk_mib: int = 192
    chunk_steps: int | None = None

    __setattr__ = Finite.__setattr__

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("objective.terms is empty: nothing would be trained")
        if self.chunk_mib < 1 or (self.chunk_steps is not None and self.chunk_steps < 1):
            raise ValueError(f"objective: chunk_mib={self.chunk_mib} and chunk_steps={self.chunk_steps} must be >= 1")
        taken: set[str] = set()
        for term in self.terms:
            name = base = term.name or type(term.signal).__name__
            number = 1
            while name in taken:  # Z, channels and logs go by it
                number += 1
                name = f"{base}_{number}"
            term.name = name
            taken.add(name)

    @property
    def active(self) -> list[Term]:
        # asked anew each time: callbacks turn coefficients
        return [term for term in self.terms if term.coefficient != 0]

    @property
    def chunk_size(self) -> ChunkSize:
        return ChunkSize(self.chunk_mib, self.chunk_steps)

    def modules(self) -> nn.ModuleDict:
        """Returns the parts that are torch modules, whose parameters are trained with the student."""
        return nn.ModuleDict(
            {
                f"{term.name}_{type(part).__name__}".replace(".", "_"): part
                for term in self.terms
                for part in term.parts()
                if isinstance(part, nn.Module)
            }
        )

    def teachers(self) -> set[str]:
        """Names the teachers whose forward pass a term needs, at its present coefficient."""
        return set().union(*(term.teachers for term in self.active))

    def layers(self, name: str, depth: int) -> list[int]:
        """Lists the layers of a policy, of ``depth`` layers, whose hidden states a term reads at its coefficient."""
        wanted: set[int] = set()
        for term in self.active:
            for part in term.parts():
                if part.layers == "all":
                    wanted |= {*range(1, depth + 1)} if name in ("student", term.teacher) else set()
                else:
                    wanted |= {*part.layers} if name == "student" else set()
                    wanted |= {*part.layers.values()} if name == term.teacher else set()
        return sorted(wanted)

    def check(
        self,
        teachers: Set[str],
        provides: Set[str] | None = None,
        sources: Set[str] | None = None,
        top_k: Mapping[str, int] | None = None,
        elsewhere: Set[str] = frozenset(),
        aligned: Mapping[str, bool] | None = None,
    ) -> None:
        """Refuses what cannot be served, naming the part and what is missing.

        Args:
            teachers: names in model.teachers.
            provides: which of `Part.needs` the run offers, besides teachers; None: not known yet.
            sources: behavior policies that act in this run; None: not known yet.
            top_k: of teachers that tell no distributions, how many of the likeliest actions of a state they tell.
            elsewhere: teachers without a policy in this process.
            aligned: those of another tokenizer among them, and whether they tell what `Aligned` holds.

        Raises:
            ValueError: a term asks for something else.
        """
        for i, term in enumerate(self.terms):
            where = f"objective.terms[{i}] ({term.name})"
            for name in sorted(term.teachers - teachers):
                raise ValueError(f"{where}: no teacher '{name}' in model.teachers, which has {sorted(teachers)}")
            if sources is not None and term.coefficient != 0 and term.source not in sources | {None}:
                raise ValueError(
                    f"{where}.source: nobody called '{term.source}' acts; rollout.behavior: {sorted(sources)}"
                )
            if term.target is not None and "teacher" not in term.needs:
                raise ValueError(f"{where}.target: {term.name} compares with no teacher, so nothing reads the target")
            for part in term.parts():
                if part.layers and term.target is not None:
                    raise ValueError(f"{where}.target: {type(part).__name__} reads hidden states; a target has none")
                if part.layers and term.teacher in elsewhere:
                    raise ValueError(
                        f"{where}: {type(part).__name__} reads hidden states of layers, and "
                        f"model.teachers.{term.teacher} has no policy in this process, which alone has them"
                    )
                if "teacher" in part.needs and term.teacher is None:
                    raise ValueError(f"{where}: {type(part).__name__} needs a teacher; name an entry of model.teachers")
                term.check_told(where, part, top_k or {})
                term.check_aligned(where, part, aligned or {})
                for need in sorted(term.needs_of(part, aligned or {}) - provides) if provides is not None else ():
                    # policies that act store their log-probs; only dataset completions have none
                    acts = need == "behavior" and term.source not in (None, "dataset")
                    if not acts:
                        unknown = "this setting does not name it in `provides`, where it says what it offers"
                        raise ValueError(
                            f"{where}: {type(part).__name__} needs '{need}': {part.advice.get(need, unknown)}"
                        )

    # -- before a generation batch is trained ---------------------------------------------------------------------

    def generation_parts(self) -> list[tuple[Term, Part]]:
        """Lists the parts of scope ``generation``, with their terms."""
        return [(term, part) for term in self.active for part in term.parts() if part.scope == "generation"]

    def generation_streams(self) -> set[str] | None:
        """Names the teachers whose distributions those parts read.

        None where they read no distribution, not even the student's: then no forward pass is needed.
        """
        reading = [(term, part) for term, part in self.generation_parts() if part.reads]
        if not reading:
            return None
        compared = (term.compared for term, part in reading if any(name.startswith("teacher/") for name in part.reads))
        return set().union(*compared, *(part.streams for _, part in reading))

    @torch.no_grad()
    def measure(self, batches: Iterable[Queried], width: int) -> dict[str, Tensor]:
        """Measures what those parts read, by `statistic_key`: ``[B, width]`` on the CPU over all micro-batches, NaN
        where nothing is trained and where the stream is not defined."""
        reads = {
            statistic_key(name, term.stream): (term, name)
            for term, part in self.generation_parts()
            for name in part.reads
        }
        rows: dict[str, list[Tensor]] = {key: [] for key in reads}
        for student, streams, trajectories in batches:
            steps = Steps.of(trajectories, availability(streams))
            shape = (len(trajectories), width)
            values = {key: torch.full(shape, torch.nan, device=steps.index.device) for key in reads}
            for _, chunk in Chunks.at(student, streams, steps, self.chunk_size).opened():
                for key, (term, name) in reads.items():
                    value = term.measured(chunk, name).float()
                    for teacher in term.compared if name.startswith("teacher/") else {name.split("/")[0]} - {"student"}:
                        value = value.masked_fill(~chunk.knows(teacher), torch.nan)
                    values[key][chunk.trajectory, chunk.column] = value
                # its logits must be freed before the next piece is opened
                del chunk
            for key, value in values.items():
                rows[key].append(value.cpu())
        return {key: torch.cat(value) for key, value in rows.items()}

    def settle(
        self,
        trajectories: Trajectories,
        available: dict[str, Tensor],
        statistics: dict[str, Tensor],
        everywhere: Callable[[Tensor], Tensor],
    ) -> Trajectories:
        """Adds a channel for each part of scope ``generation`` (`Term.channel`).

        Args:
            trajectories: a generation batch, on the CPU.
            available: ``[B]`` bool by teacher, as in `availability`.
            statistics: ``[B, T]`` by `statistic_key` (`measure`).
            everywhere: concatenates over ranks.
        """
        steps = Steps.of(trajectories, available)
        channels = dict(trajectories.channels)
        for term, part in self.generation_parts():
            on = torch.zeros_like(trajectories.mask)
            on.view(-1)[steps.index] = term.on(steps)
            reads = {name: statistics[statistic_key(name, term.stream)] for name in part.reads}
            channels[term.channel(part)] = part.settle(Generation(steps.trajectories, on, reads, everywhere)).detach()
        return dataclasses.replace(trajectories, channels=channels)

    # -- before an optimizer step ---------------------------------------------------------------------------------

    @property
    def needs_totals(self) -> bool:
        """True where some Z is known only after a forward pass over the whole optimizer step."""
        return any(term.sums_distributions for term in self.active)

    def normalizers(
        self,
        batches: Iterable[tuple[Trajectories, dict[str, Tensor]]],
        weight_sums: Iterable[dict[str, float]],
        total: Callable[[float], float],
    ) -> dict[str, float]:
        """Computes Z by term name (`Term.normalizer`).

        Args:
            batches: the micro-batches of an optimizer step, with the availability of `routed_teachers`.
            weight_sums: of each micro-batch (`weight_sums`), for the terms whose weights read distributions.
            total: sums over ranks.
        """
        sums = dict.fromkeys((term.name for term in self.active), 0.0)
        for trajectories, available in batches:
            steps = Steps.of(trajectories, available)
            for term in self.active:
                if term.normalizer == "steps":
                    sums[term.name] += int(trajectories.rewarded_steps if "reward" in term.needs else len(steps))
                elif term.normalizer == "on":
                    sums[term.name] += int(term.on(steps).sum())
                elif term.normalizer == "trajectories":
                    sums[term.name] += len(steps.trajectory[term.on(steps)].unique())
                elif not term.sums_distributions:
                    sums[term.name] += float(term.known(steps).double().sum())
        for weights in weight_sums:
            for name, value in weights.items():
                sums[name] += value
        totals = {name: total(value) for name, value in sums.items()}
        # with nothing to train Z is arbitrary
        return {name: value or 1.0 for name, value in totals.items()}

    def routed_teachers(self) -> set[str]:
        """Names the teachers whose availability decides Z."""
        return set().union(*(term.compared for term in self.active if term.normalizer != "steps"))

    def weight_sums(
        self, queried: Iterable[tuple[Distribution, dict[str, Stream]]], batches: Sequence[Trajectories]
    ) -> list[dict[str, float]]:
        """Sums the weights by term name and micro-batch, for terms whose Z is that sum and reads distributions.

        Args:
            queried: student and teachers of each micro-batch; not evaluated where no term needs it.
            batches: the micro-batches.
        """
        terms = [term for term in self.active if term.sums_distributions]
        if not terms:
            return []
        return [
            LossPass(terms, student, streams, trajectories, self.chunk_size).weight_sums()
            for (student, streams), trajectories in zip(queried, batches, strict=True)
        ]

    # -- the evaluation -------------------------------------------------------------------------------------------

    def __call__(
        self,
        student: Distribution,
        streams: dict[str, Stream],
        trajectories: Trajectories,
        normalizers: dict[str, float] | None = None,
        diagnose: bool = False,
    ) -> LossOutput:
        """Evaluates one micro-batch.

        Args:
            student: at all B × T states, with gradient.
            streams: teachers by name, at all B × T states, without gradient.
            trajectories: the micro-batch.
            normalizers: Z of its optimizer step, by term name; None: the micro-batch stands alone, as a generation
                batch of its own.
            diagnose: also average the diagnostics that cost an extra look at the vocabulary.

        Returns:
            A loss connected to ``student``; where nothing is left to train, a zero that still is.
        """
        _check_states(student, streams, trajectories)
        if normalizers is None:
            trajectories, normalizers = self._alone(student, streams, trajectories)
        evaluation = LossPass(self.active, student, streams, trajectories, self.chunk_size)
        return LossOutput(evaluation.run(normalizers, diagnose), evaluation.metrics)

    def _alone(
        self, student: Distribution, streams: dict[str, Stream], trajectories: Trajectories
    ) -> tuple[Trajectories, dict[str, float]]:
        if self.generation_parts():
            statistics = self.measure([(student, streams, trajectories)], trajectories.mask.shape[1])
            available = {name: here.cpu() for name, here in availability(streams).items()}
            # where `settle` runs in training, too
            settled = self.settle(trajectories.to("cpu"), available, statistics, lambda values: values)
            trajectories = settled.to(trajectories.mask.device)
        sums = self.weight_sums([(student, streams)], [trajectories])
        return trajectories, self.normalizers([(trajectories, availability(streams))], sums, float)

    @torch.no_grad()
    def diagnose(self, student: Distribution, streams: dict[str, Stream], trajectories: Trajectories) -> Averages:
        """Averages the diagnostics alone, over every trained step."""
        metrics = Averages(device=trajectories.mask.device)
        steps = Steps.of(trajectories, availability(streams))
        for _, chunk in Chunks.at(student, streams, steps, self.chunk_size).opened():
            chunk_diagnostics(chunk, metrics)
            del chunk
        return metrics

    @torch.no_grad()
    def per_step(
        self,
        student: Distribution,
        streams: dict[str, Stream],
        steps: Steps,
        read: Callable[[OpenSteps], Tensor],
        teacher: str | None = None,
    ) -> Tensor:
        """Evaluates ``read`` at the trained steps, chunk by chunk: ``[B, T]``, NaN elsewhere.

        Args:
            student: at all B × T states.
            streams: teachers by name, at all B × T states.
            steps: all trained steps.
            read: from the n steps of an open chunk to ``[n]``.
            teacher: which of the streams ``steps.teacher`` stands for; NaN where it is not defined.
        """
        _check_states(student, streams, steps.trajectories)
        shape = steps.trajectories.mask.shape
        values = torch.full(shape, torch.nan, device=steps.index.device, dtype=torch.float32)
        for _, chunk in Chunks.at(student, streams, steps, self.chunk_size).opened():
            here = read(chunk.for_term(teacher, chunk.streams[teacher] if teacher is not None else None)).float()
            if teacher is not None:
                here = here.masked_fill(~chunk.knows(teacher), torch.nan)
            values.view(-1)[chunk.index] = here
            del chunk
        return values


def _check_states(student: Distribution, streams: dict[str, Stream], trajectories: Trajectories) -> None:
    """Refuses distributions that a setting returned for other states.

    Raises:
        TypeError: it is no `Distribution`.
        ValueError: a distribution is not that of one state for every step of the mask.
    """
    teachers = {name: stream.distribution for name, stream in streams.items()}
    for name, distribution in {"student": student, **teachers}.items():
        if not isinstance(distribution, Distribution):
            raise TypeError(
                f"`distribution` returned {quoted(distribution)}, of type {type(distribution).__name__}; it has to "
                "return a Distribution, such as a Categorical or a Gaussian, at every state of the trajectories"
            )
        if distribution.states not in (None, tuple(trajectories.mask.shape)):
            raise ValueError(
                f"`distribution` returned for the {'student' if name == 'student' else f'teacher {name!r}'} "
                f"distributions at {' × '.join(map(str, distribution.states or ()))} states; the trajectories have "
                f"{' × '.join(map(str, trajectories.mask.shape))} (their mask): the state that action t was taken in "
                "belongs at t, none behind the last action; what is kept for each step belongs in "
                "Trajectories.channels, which are cut with the mask, and not in the observation"
            )
