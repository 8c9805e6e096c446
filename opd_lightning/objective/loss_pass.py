"""LossPass: one micro-batch through the terms, in four phases.

Shape legend: B trajectories, N trained steps of the micro-batch, n of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..diagnostics import Averages
from ..distribution import Distribution, GradientAccumulator, Stream
from ..trajectory import Trajectories
from .chunks import Chunks, ChunkSize, GradientsInside
from .diagnostics import chunk_diagnostics
from .steps import OpenSteps, Steps, statistic_key
from .term import Term, weighed


@dataclass
class Share:
    """One term of a micro-batch, when its chunks are opened.

    Attributes:
        term: with its weights and its advantage.
        factor: ``[N]`` what each step's loss is multiplied by, but for the weights that read the open chunk.
        inputs: ``[N]`` each, by name: those of its signal that do not read the open chunk.
    """

    term: Term
    factor: Tensor
    inputs: dict[str, Tensor]

    def seen(self, chunk: OpenSteps, states: slice) -> OpenSteps:
        """Adds the term's target and its signal's inputs to an open chunk of the steps ``states``."""
        view = self.term.seen(chunk)
        inputs = {
            name: self.inputs[name][states] if name in self.inputs else part(view).detach()
            for name, part in self.term.signal.inputs.items()
        }
        # where the term is off the values may be NaN (no behavior log-probs), which a factor of 0 does not undo
        on = self.factor[states] != 0
        return replace(view, inputs={name: torch.where(on, values, 0.0) for name, values in inputs.items()})


class LossPass:
    """Evaluates the terms on one micro-batch.

    1. data     weights that are known from the trajectories; steps that no term wants leave
    2. wide     statistics over whole rows, in a pass without gradient, if a part reads them
    3. factors  per term ``[N]``: coefficient × weights / Z, and what its signal asks for where that is known by now
    4. chunks   open, evaluate every term, differentiate, close; logits never outlive a chunk

    No field holds anything of a chunk: what does would keep its logits.

    Args:
        terms: those that are on.
        student: at all B × T states.
        streams: teachers by name, at all B × T states.
        trajectories: the micro-batch.
        size: of a chunk.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        student: Distribution,
        streams: dict[str, Stream],
        trajectories: Trajectories,
        size: ChunkSize,
    ) -> None:
        self.terms, self.metrics = terms, Averages(device=trajectories.mask.device)
        everything = Steps.of(trajectories, availability(streams))
        wanted = everything.at(self._wanted(everything).nonzero().squeeze(-1))  # 1.
        self.chunks = Chunks.at(student, streams, wanted, size)
        self._measure()  # 2.

    @property
    def steps(self) -> Steps:
        return self.chunks.steps

    def run(self, normalizers: dict[str, float], diagnose: bool) -> Tensor:
        """This micro-batch's share of the loss, a scalar; where nothing is left to train, a zero with gradients.

        Args:
            normalizers: Z by term name.
            diagnose: also average the diagnostics that cost an extra look at the vocabulary.
        """
        self.metrics.add("empty_micro_batches", float(not len(self.steps)))
        parameters = part_parameters(self.terms)
        if not len(self.steps):
            # a zero that touches every input: DDP waits for the gradient of each
            inputs = [*self.chunks.student.accumulator().inputs, *parameters]
            return torch.stack([(tensor * 0).sum().float() for tensor in inputs]).sum()
        shares = [self._share(term, term.coefficient / normalizers[term.name]) for term in self.terms]  # 3.
        self._restrict(shares)

        def evaluate(accumulator: GradientAccumulator | None) -> tuple[Tensor, list[Tensor | None]]:  # 4.
            total = torch.zeros((), device=self.steps.index.device, dtype=torch.float64)
            gradients: list[Tensor | None] = [None] * len(parameters)
            for states, chunk in self.chunks.opened(accumulator):
                if diagnose:
                    chunk_diagnostics(chunk, self.metrics)
                with torch.enable_grad() if accumulator is not None else torch.no_grad():
                    loss = self._chunk_loss(shares, states, chunk)
                    if accumulator is not None:
                        if parameters:
                            # the accumulator goes through this graph again; a part may have no share in a piece
                            pieces = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                            gradients = [_sum(one, other) for one, other in zip(gradients, pieces, strict=True)]
                        accumulator.close(loss)
                total += loss.detach()
                del chunk, loss  # tensors of this piece must be freed before the next is opened
            return total.float(), [*(accumulator.gradients if accumulator is not None else ()), *gradients]

        if not torch.is_grad_enabled():
            return evaluate(None)[0]
        accumulator = self.chunks.student.accumulator()
        loss: Tensor = GradientsInside.apply(lambda: evaluate(accumulator), *accumulator.inputs, *parameters)
        return loss

    @torch.no_grad()
    def weight_sums(self) -> dict[str, float]:
        """Sums the weights over this micro-batch, by term name."""
        # scale 1: Z is a sum of bare weights
        shares = [self._share(term, 1.0) for term in self.terms]
        sums = {share.term.name: torch.zeros((), dtype=torch.float64) for share in shares}
        reading = [share for share in shares if share.term.weights_of("step")]
        for share in shares:
            if not share.term.weights_of("step"):
                sums[share.term.name] += share.factor.double().sum().cpu()
        for states, chunk in self.chunks.opened() if reading else ():
            for share in reading:
                factor = self._weighed(share, share.term.seen(chunk), share.factor[states])
                sums[share.term.name] += factor.double().sum().cpu()
            del chunk
        return {name: float(total) for name, total in sums.items()}

    def _wanted(self, steps: Steps) -> Tensor:
        """Selects the steps to which some term gives a weight, ``[N]`` bool; all if a part reads whole rows."""
        wanted = torch.zeros(len(steps), dtype=torch.bool, device=steps.index.device)
        for term in self.terms:
            for weight in term.weights_of("data", "generation"):
                name = f"{term.name}/{type(weight).__name__}"
                self.metrics.add_clipped(name, term.value(weight, steps), term.on(steps))
            wanted |= term.known(steps) > 0
        whole_rows = any(part.scope == "row" for term in self.terms for part in term.parts())
        return torch.ones_like(wanted) if whole_rows else wanted

    @torch.no_grad()
    def _measure(self) -> None:
        """Measures the statistics ``[N]`` that parts of scope ``row`` read."""
        reads = {
            statistic_key(name, term.stream): (term, name)
            for term in self.terms
            for part in term.parts()
            if part.scope == "row"
            for name in part.reads
        }
        # a micro-batch without trained steps has its share of every statistic too: none
        values = {key: [torch.zeros(0, device=self.steps.index.device)] for key in reads}
        for _, chunk in self.chunks.opened() if reads else ():
            for key, (term, name) in reads.items():
                values[key].append(term.measured(chunk, name))
            del chunk
        self.steps.statistics = {key: torch.cat(pieces) for key, pieces in values.items()}

    def _share(self, term: Term, scale: float) -> Share:
        """Computes a term's factor and its signal's inputs, but for the parts that read the open chunk."""
        steps = self.steps
        factor = term.counts(steps)
        for weight in term.weights_of("data", "generation", "row"):
            values = term.value(weight, steps)
            # others were counted in `_wanted`, before steps left
            if weight.scope == "row":
                self.metrics.add_clipped(f"{term.name}/{type(weight).__name__}", values, term.on(steps))
            factor = weighed(factor, values)
        wide = {name: part for name, part in term.signal.inputs.items() if part.scope != "step"}
        return Share(term, factor * scale, {name: term.value(part, steps) for name, part in wide.items()})

    def _restrict(self, shares: list[Share]) -> None:
        """Restricts every teacher to the steps where a term that reads it has a factor."""
        streams = self.chunks.streams
        for name, stream in streams.items():
            read = [share.factor != 0 for share in shares if name in share.term.teachers]
            if read:
                wanted = stream.distribution.only_at(torch.stack(read).any(0))
                streams[name] = replace(stream, distribution=wanted)

    def _chunk_loss(self, shares: list[Share], states: slice, chunk: OpenSteps) -> Tensor:
        losses = []
        for share in shares:
            view = share.seen(chunk, states)
            values = share.term.signal(view)
            factor = self._weighed(share, view, share.factor[states], self.metrics)
            # an infinite loss at a step of weight 0 must not turn into NaN
            on = factor != 0
            losses.append(torch.where(on, values * factor, 0.0).sum())
            self.metrics.add(f"loss/{share.term.name}", torch.where(on, values.detach(), 0.0), on.float())
        return torch.stack(losses).sum()

    @staticmethod
    def _weighed(share: Share, view: OpenSteps, factor: Tensor, metrics: Averages | None = None) -> Tensor:
        """Multiplies a factor ``[n]`` with the weights that read the open chunk."""
        for weight in share.term.weights_of("step"):
            values = weight(view).detach()
            if metrics is not None:
                metrics.add_clipped(f"{share.term.name}/{type(weight).__name__}", values, share.term.on(view))
            factor = weighed(factor, values)
        return factor


def part_parameters(terms: Sequence[Term]) -> list[nn.Parameter]:
    """Parameters of parts that are torch modules, such as a projection; they are trained with the student."""
    modules = {part: None for term in terms for part in term.parts() if isinstance(part, nn.Module)}
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def availability(streams: dict[str, Stream]) -> dict[str, Tensor]:
    """Returns the trajectories ``[B]`` (bool) for which a teacher is defined, by teacher, where that is not all."""
    return {name: stream.available for name, stream in streams.items() if stream.available is not None}
