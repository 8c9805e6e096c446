"""The objective: a sum of terms, evaluated chunk by chunk over the flattened trained steps.

    L(θ) = Σ_k c_k · (1/Z_k) Σ_{i,t} m_it · w_k(i,t) · ℓ_k( p_θ(·|s_it), q_k(·|v_k(s_it)) )

Shape legend: B trajectories, N trained steps of the micro-batch, n of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..diagnostics import Averages, chunk_diagnostics
from ..distribution import Distribution, Stream
from ..finite import Finite
from ..optimizer_step import Totals
from ..printable import quoted
from ..trajectory import Trajectories
from .policy_gradient import Advantage, PolicyGradient
from .signal import Part, Signal
from .steps import Steps, measure
from .target import Target
from .weight import Weight

Available = dict[str, Tensor]
"""``[B]`` bool by teacher: the trajectories for which it is defined; others are for all."""


@dataclass
class Term:
    """One summand of the objective.

    Args:
        signal: what a step contributes.
        teacher: an entry of ``model.teachers``; None for signals that ask no teacher.
        weights: multiplied with each other.
        target: turns the teacher's distribution into another one first.
        source: only trajectories of this behavior policy (``student``, ``dataset`` or a teacher's name); None: all.
        coefficient: c, a public knob; at 0 the term and its teacher's forward pass are skipped.
        normalizer: Z. ``steps``: all trained steps of the optimizer step, whatever the weights, but for a term that
            reads rewards those of rows whose reward abstains; ``weights``: the sum of this term's weights over it.
            Steps where the term is off (another source, no view, no reward) weigh 0.
        name: in logs; default: the signal's class name.
    """

    signal: Signal
    teacher: str | None = "teacher"
    weights: list[Weight] = field(default_factory=list)
    target: Target | None = None
    source: str | None = None
    coefficient: float = 1.0
    normalizer: Literal["steps", "weights"] = "steps"
    name: str | None = None

    __setattr__ = Finite.__setattr__

    def parts(self) -> list[Part]:
        extra = [self.signal.advantage] if isinstance(self.signal, PolicyGradient) else []
        return [self.signal, *extra, *self.weights]

    @property
    def needs(self) -> set[str]:
        return set().union(*(part.needs for part in self.parts()))

    @property
    def stream(self) -> str | None:
        """Name of what the term compares with: its teacher, or what its target makes of it."""
        return self.teacher if self.target is None else f"{self.teacher} as {self.name}'s target"

    @property
    def teachers(self) -> set[str]:
        """Names whose forward pass the term needs."""
        own = {self.teacher} if self.teacher is not None and "teacher" in self.needs else set()
        return own | set(self.target.streams if self.target else ())


class LossOutput(NamedTuple):
    """A micro-batch's share of the loss, and what is to be logged of it."""

    loss: Tensor
    metrics: Averages


@dataclass
class Objective:
    """A list of terms.

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
        seen: dict[str, int] = {}
        for term in self.terms:
            name = term.name or type(term.signal).__name__
            seen[name] = seen.get(name, 0) + 1
            term.name = name if seen[name] == 1 else f"{name}_{seen[name]}"

    @property
    def active(self) -> list[Term]:
        return [term for term in self.terms if term.coefficient != 0]

    def teachers(self) -> set[str]:
        """Whose forward pass is needed now."""
        return set().union(*(term.teachers for term in self.active))

    def check(self, teachers: set[str], provides: set[str], sources: set[str]) -> None:
        """Refuse what cannot be served, naming the part and what is missing.

        Args:
            teachers: names in model.teachers.
            provides: which of `Part.needs` the run offers, besides teachers.
            sources: behavior policies that act in this run.
        """
        advice = {
            "reward": "set model.reward (a setting whose `rewards` has rewards of its own names it in `provides`)",
            "group": "set rollout.group_size > 1",
            "behavior": "dataset completions have no behavior log-probs: give the term `source: student`",
            "categorical": "only distributions over a vocabulary have it",
            "digits": "only settings that read numbers out of tokens know them (GUIGroundingDistillation)",
            "latents": "only samplers of images have velocities (DiffusionDistillation)",
        }
        for i, term in enumerate(self.terms):
            where = f"objective.terms[{i}] ({term.name})"
            for name in sorted(term.teachers - teachers):
                raise ValueError(f"{where}: no teacher '{name}' in model.teachers, which has {sorted(teachers)}")
            if term.coefficient != 0 and term.source is not None and term.source not in sources:
                raise ValueError(
                    f"{where}.source: nobody called '{term.source}' acts; rollout.behavior: {sorted(sources)}"
                )
            if term.target is not None and "teacher" not in term.needs:
                raise ValueError(f"{where}.target: {term.name} compares with no teacher, so nothing reads the target")
            for part in term.parts():
                if "teacher" in part.needs and term.teacher is None:
                    raise ValueError(f"{where}: {type(part).__name__} needs a teacher; name an entry of model.teachers")
                for need in sorted(part.needs - {"teacher"} - provides):
                    known = need == "behavior" and term.source not in (None, "dataset")
                    if not known:
                        how = advice.get(
                            need, "this setting does not name it in `provides`, where it says what it offers"
                        )
                        raise ValueError(f"{where}: {type(part).__name__} needs '{need}': {how}")

    # -- what has to be known before the first chunk ------------------------------------------------------------

    def statistics_needed(self, scopes: set[str]) -> list[tuple[Term, str]]:
        """Statistics that parts of these scopes read, with the term whose teacher is meant."""
        found = {}
        for term in self.active:
            for part in term.parts():
                if part.scope in scopes or (
                    term.normalizer == "weights" and "batch" in scopes and part in term.weights
                ):
                    for name in part.reads:
                        found[term.stream if name.startswith("teacher") else "", name] = (term, name)
        return list(found.values())

    @property
    def needs_totals(self) -> bool:
        """Whether the first micro-batch must wait for statistics of the whole optimizer step."""
        return bool(self.statistics_needed({"batch"}))

    def measure(
        self, student: Distribution, streams: dict[str, Stream], steps: Steps, scopes: set[str]
    ) -> dict[str, Tensor]:
        """The statistics ``[N]`` that parts of these scopes read, from a pass without gradient."""
        wanted = self.statistics_needed(scopes)
        # a micro-batch without trained steps has its share of every statistic too: none
        nothing = torch.zeros(0, device=steps.index.device)
        found = {steps.for_term(term.stream).key(name): [nothing] for term, name in wanted}
        for _, chunk in self._opened(student, streams, steps) if wanted else ():
            for term, name in wanted:
                seen = self._see(chunk, term)
                found[seen.key(name)].append(measure(seen, name))
        return {key: torch.cat(values) for key, values in found.items()}

    def weight_sums(
        self, micro_batches: Sequence[Trajectories], totals: Totals, available: list[Available]
    ) -> dict[str, Tensor]:
        """Σ of weights over this rank's micro-batches for the terms that divide by it; summed over ranks elsewhere."""
        sums: dict[str, Tensor] = {}
        for term in self.active:
            if term.normalizer == "weights":
                total = torch.zeros(())
                for i, micro_batch in enumerate(micro_batches):
                    steps = Steps.of(micro_batch, available[i])
                    if totals.statistics is not None:
                        steps.statistics = totals.statistics[i]
                        steps.everywhere = totals.over_batch
                    total = total + self._weigh(steps.for_term(term.stream), term, term.weights).sum().cpu()
                assert term.name is not None
                sums[term.name] = total
        return sums

    # -- the evaluation -----------------------------------------------------------------------------------------

    def __call__(
        self,
        student: Distribution,
        streams: dict[str, Stream],
        trajectories: Trajectories,
        totals: Totals | None = None,
        micro_batch: int = 0,
        diagnose: bool = False,
    ) -> LossOutput:
        """Evaluates one micro-batch.

        Args:
            student: at all B × T states, with gradient.
            streams: teachers by name, at all B × T states, without gradient.
            trajectories: the micro-batch.
            totals: what the losses of its optimizer step are divided by; None: the micro-batch stands alone.
            micro_batch: its place in the optimizer step.
            diagnose: also average the diagnostics that cost an extra look at the vocabulary.

        Returns:
            A loss connected to ``student``; where nothing is left to train, a zero that still is.
        """
        _check_states(student, streams, trajectories)
        steps = Steps.of(trajectories, availability(streams))
        totals = totals or self._alone(trajectories, student, streams)
        steps.everywhere = totals.over_batch
        if totals.statistics is not None:
            steps.statistics = dict(totals.statistics[micro_batch])

        averages = Averages(device=trajectories.mask.device)
        self._settle(steps, {"data"})
        self._count_clipped(steps, averages, {"data"})
        steps = self._drop_weightless(steps)
        student, streams = student.at(steps.index), {name: stream.at(steps.index) for name, stream in streams.items()}
        averages.add("empty_micro_batches", float(not len(steps)))
        if not len(steps):
            inputs = student.accumulator().inputs
            nothing = torch.stack([(tensor * 0).sum().float() for tensor in inputs]).sum()
            return LossOutput(nothing, averages)

        steps.statistics = self.measure(student, streams, steps, {"row"}) | steps.statistics
        self._settle(steps, {"row", "batch"})
        self._count_clipped(steps, averages, {"row", "batch"})
        factors: dict[str | None, Tensor] = {}
        for term in self.active:
            ahead = self._weigh(steps.for_term(term.stream), term, _of_scope(term, {"data", "row", "batch"}))
            factors[term.name] = ahead * (term.coefficient / self._normalizer(term, totals))

        for name, stream in streams.items():
            read = [factors[term.name] != 0 for term in self.active if name in term.teachers]
            if read:
                wanted = stream.distribution.only_at(torch.stack(read).any(0))
                streams[name] = replace(stream, distribution=wanted)

        def evaluate(accumulator: Any) -> Tensor:
            total = torch.zeros((), device=trajectories.mask.device, dtype=torch.float64)
            for states, chunk in self._opened(student, streams, steps, accumulator):
                if diagnose:
                    chunk_diagnostics(chunk, averages)
                with torch.enable_grad() if accumulator is not None else torch.no_grad():
                    loss = self._chunk_loss(chunk, {name: f[states] for name, f in factors.items()}, averages)
                    if accumulator is not None:
                        accumulator.close(loss)
                total += loss.detach()
                del chunk, loss  # nothing of a piece may be alive when the next is opened
            return total.float()

        if not torch.is_grad_enabled():
            return LossOutput(evaluate(None), averages)
        accumulator = student.accumulator()
        return LossOutput(_GradientsInside.apply(evaluate, accumulator, *accumulator.inputs), averages)

    @torch.no_grad()
    def diagnose(self, student: Distribution, streams: dict[str, Stream], trajectories: Trajectories) -> Averages:
        """Averages the diagnostics alone, over every trained step."""
        steps = Steps.of(trajectories, availability(streams))
        averages = Averages(device=trajectories.mask.device)
        student, streams = student.at(steps.index), {name: stream.at(steps.index) for name, stream in streams.items()}
        for _, chunk in self._opened(student, streams, steps):
            chunk_diagnostics(chunk, averages)
        return averages

    @torch.no_grad()
    def per_step(
        self,
        student: Distribution,
        streams: dict[str, Stream],
        steps: Steps,
        read: Callable[[Steps], Tensor],
        teacher: str | None = None,
    ) -> Tensor:
        """``[B, T]`` what ``read`` says of the trained steps, chunk by chunk; NaN elsewhere.

        Args:
            student: at all B × T states.
            streams: teachers by name, at all B × T states.
            steps: all trained steps.
            read: from the n steps of an open chunk to ``[n]``.
            teacher: which of the streams ``steps.teacher`` stands for; NaN where it has nothing to say.
        """
        _check_states(student, streams, steps.trajectories)
        shape = steps.trajectories.mask.shape
        values = torch.full(shape, torch.nan, device=steps.index.device, dtype=torch.float32)
        student, streams = student.at(steps.index), {name: stream.at(steps.index) for name, stream in streams.items()}
        for _, chunk in self._opened(student, streams, steps):
            said = read(chunk.for_term(teacher, chunk.streams[teacher] if teacher is not None else None)).float()
            if teacher in chunk.available:
                said = said.masked_fill(~chunk.per_trajectory(chunk.available[teacher]), torch.nan)
            values.view(-1)[chunk.index] = said
        return values

    def _chunk_loss(self, chunk: Steps, factors: dict[str | None, Tensor], averages: Averages) -> Tensor:
        losses = []
        for term in self.active:
            seen = self._see(chunk, term)
            assert term.name is not None
            values = term.signal(seen)
            factor = factors[term.name]
            for weight in _of_scope(term, {"step"}):
                local = weight(seen).detach()
                averages.add_clipped(term.name, weight, local, self._on(seen, term))
                factor = factor * local
            # an infinite loss at a step of weight 0 must not turn into NaN
            on = factor != 0
            losses.append(torch.where(on, values * factor, 0.0).sum())
            averages.add(f"loss/{term.name}", torch.where(on, values.detach(), 0.0), on.float())
        return torch.stack(losses).sum()

    def _settle(self, steps: Steps, scopes: set[str]) -> None:
        """Evaluates the weights and advantages of these scopes once, for all N steps."""
        for term in self.active:
            for part in term.parts():
                if part.scope in scopes and isinstance(part, Weight | Advantage):
                    steps.parts[id(part), term.stream] = part(steps.for_term(term.stream)).detach()

    def _drop_weightless(self, steps: Steps) -> Steps:
        """Without the steps that no term gives a weight, unless some part wants to see whole rows."""
        parts = [part for term in self.active for part in term.parts()]
        if any(part.scope in ("row", "batch") for part in parts):
            return steps
        known = [self._weigh(steps.for_term(term.stream), term, _of_scope(term, {"data"})) for term in self.active]
        kept = (
            torch.stack([weight > 0 for weight in known]).any(0)
            if known
            else steps.index.new_zeros(0, dtype=torch.bool)
        )
        return steps.at(kept.nonzero().squeeze(-1))

    def _see(self, chunk: Steps, term: Term) -> Steps:
        """The open chunk as a term sees it: with its target built, if it has a teacher."""
        if not term.teachers:
            return chunk.for_term(term.stream)
        assert term.teacher is not None
        target = chunk.streams[term.teacher]
        if term.target is not None:
            target = term.target({**chunk.streams, "teacher": target, "student": chunk.student})  # type: ignore[dict-item]
        return chunk.for_term(term.stream, target)

    def _on(self, steps: Steps, term: Term) -> Tensor:
        """``[N]`` bool: where the term applies at all."""
        on = torch.ones(len(steps), dtype=torch.bool, device=steps.index.device)
        for name in term.teachers & set(steps.available):
            on &= steps.per_trajectory(steps.available[name])
        if term.source is not None:
            on &= steps.per_trajectory(steps.trajectories.source == steps.trajectories.sources.index(term.source))
        if "reward" in term.needs and steps.abstained is not None:
            on &= ~steps.per_trajectory(steps.abstained)
        return on

    def _weigh(self, steps: Steps, term: Term, weights: list[Weight]) -> Tensor:
        """``[N]`` product of the trajectory's weight and some of the term's, 0 where the term is off."""
        product = self._on(steps, term).float()
        if steps.trajectories.weight is not None:
            product = product * steps.per_trajectory(steps.trajectories.weight)
        for weight in weights:
            product = product * steps.part(weight).detach()
        return product

    def _count_clipped(self, steps: Steps, averages: Averages, scopes: set[str]) -> None:
        for term in self.active:
            seen = steps.for_term(term.stream)
            for weight in _of_scope(term, scopes):
                assert term.name is not None
                averages.add_clipped(term.name, weight, seen.part(weight), self._on(seen, term))

    def _normalizer(self, term: Term, totals: Totals) -> float:
        if term.normalizer == "steps":
            return max(totals.rewarded_steps if "reward" in term.needs else totals.trained_steps, 1.0)
        assert totals.weight_sums is not None
        assert term.name is not None
        return totals.weight_sums[term.name] or 1.0

    def _alone(self, trajectories: Trajectories, student: Distribution, streams: dict[str, Stream]) -> Totals:
        totals = Totals.of([trajectories], float)
        steps = Steps.of(trajectories, availability(streams))
        flat = {name: stream.at(steps.index) for name, stream in streams.items()}
        if self.needs_totals:
            totals.statistics = [self.measure(student.at(steps.index), flat, steps, {"batch", "row"})]
        sums = self.weight_sums([trajectories], totals, [availability(streams)])
        totals.weight_sums = {name: float(v) for name, v in sums.items()}
        return totals

    def _opened(
        self, student: Distribution, streams: dict[str, Stream], steps: Steps, accumulator: Any = None
    ) -> Iterator[tuple[slice, Steps]]:
        """Each piece of each chunk, and which of the N steps it is; with an ``accumulator``, for a gradient."""
        teachers = {name: stream.distribution for name, stream in streams.items()}
        blind = {name: s.without_view for name, s in streams.items() if s.without_view is not None}
        kept = sum(teacher.bytes_kept() for teacher in (*teachers.values(), *blind.values()))
        for states in self._chunks(student, len(steps), kept):
            for policy in (student if accumulator is None else accumulator, *teachers.values(), *blind.values()):
                policy.prepare(states)
            for piece in _evenly(states, student.piece(states.stop - states.start)):
                yield piece, self._piece(piece, student if accumulator is None else accumulator, teachers, blind, steps)

    @staticmethod
    def _piece(
        states: slice, student: Any, teachers: dict[str, Distribution], blind: dict[str, Distribution], steps: Steps
    ) -> Steps:
        # a function of its own, so that nothing but what it returns holds the piece
        if isinstance(student, Distribution):
            opened = student.chunk(states)
        else:
            with torch.enable_grad():
                opened = student.open(states)
        streams = {name: teacher.chunk(states) for name, teacher in teachers.items()}
        without_view = {name: teacher.chunk(states) for name, teacher in blind.items()}
        return steps.at(states, student=opened, streams=streams, without_view=without_view)

    def _chunks(self, student: Distribution, count: int, kept: int = 0) -> Iterator[slice]:
        if not count:  # then a family may not know what a state takes
            return iter(())
        size = self.chunk_steps or max(1, self.chunk_mib * 2**20 // (student.bytes_per_state() + kept))
        return _evenly(slice(0, count), size)


class _GradientsInside(torch.autograd.Function):
    """Evaluates a loss and its gradients in one go; backward only scales what is already there."""

    @staticmethod
    def forward(ctx: Any, evaluate: Callable[[Any], Tensor], accumulator: Any, *inputs: Tensor) -> Tensor:
        loss = evaluate(accumulator)
        ctx.gradients = [
            None if g is None else g.to(x.dtype) for g, x in zip(accumulator.gradients, inputs, strict=True)
        ]
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the objective's gradients were already consumed by an earlier backward pass")
        return None, None, *(None if gradient is None else gradient.mul_(outputs[0]) for gradient in gradients)


def _evenly(states: slice, size: int) -> Iterator[slice]:
    """Parts of at most ``size``, of equal length, so that no small rest costs a pass of its own."""
    count = states.stop - states.start
    if not count:
        return iter(())
    size = math.ceil(count / math.ceil(count / size))
    return (slice(start, min(start + size, states.stop)) for start in range(states.start, states.stop, size))


def availability(streams: dict[str, Stream]) -> Available:
    """For which trajectories each teacher is defined, where that is not all of them."""
    return {name: stream.available for name, stream in streams.items() if stream.available is not None}


def _check_states(student: Distribution, streams: dict[str, Stream], trajectories: Trajectories) -> None:
    """
    Raises:
        TypeError: it is none.
        ValueError: a distribution is not that of one state for every step of the mask.
    """
    for name, said in {"student": student, **{name: stream.distribution for name, stream in streams.items()}}.items():
        if not isinstance(said, Distribution):
            raise TypeError(
                f"`distribution` returned {quoted(said)}, of type {type(said).__name__}; it has to return a "
                "Distribution, such as a Categorical or a Gaussian, at every state of the trajectories"
            )
        if said.states not in (None, tuple(trajectories.mask.shape)):
            raise ValueError(
                f"`distribution` returned for the {'student' if name == 'student' else f'teacher {name!r}'} "
                f"distributions at {' × '.join(map(str, said.states or ()))} states; the trajectories have "
                f"{' × '.join(map(str, trajectories.mask.shape))} (their mask): the state that action t was taken in "
                "belongs at t, none behind the last action; what is kept for each step belongs in "
                "Trajectories.channels, which are cut with the mask, and not in the observation"
            )


def _of_scope(term: Term, scopes: set[str]) -> list[Weight]:
    return [weight for weight in term.weights if weight.scope in scopes]
