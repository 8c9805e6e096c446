"""What a policy says about the next step: `Categorical` (hidden states and a head) or `Gaussian`.

Shape legend: N states, n states of one chunk, H hidden size, V vocabulary.

A `Categorical` never holds the logits of all states. Those of one chunk are projected at once, since matrix products
want many states; what follows is computed piece by piece, since a piece fits the processor's cache. The gradient with
respect to a piece's logits takes their place, and when a chunk is done its gradients of the hidden states and of the
head are added up, so no tensor of size N × V is ever kept.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# In place of −inf: 0 × (−1e30 − −1e30) is 0 where 0 × (−inf − −inf) is NaN, and exp(−1e30) is 0 all the same.
IMPOSSIBLE = -1e30
# Pieces of a chunk, and the bytes of float32 logits below which cutting finer costs more than the cache gives
PIECES, SMALL_PIECE = 8, 2**20
# Ids whose rows of the head are cast, and whose gradients are widened, together
BLOCK = 8192


@dataclass(frozen=True)
class Head:
    """From hidden states ``[n, H]`` to float32 logits ``[n, vocabulary]``.

    Attributes:
        module: the projection; a plain `nn.Linear` takes the fast path, anything else (LoRA, quantised) autograd.
        vocabulary: ids at or above it are padding of the matrix and are cut off.
        scale: factor on the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: c in c·tanh(logits / c) (Gemma-2), or None.
        suppressed: ``[k]`` ids that can never be an action (image placeholders, …), or None.
        context: entered around every projection; teachers that share the student's head switch adapters here.
    """

    module: nn.Module
    vocabulary: int
    scale: float = 1.0
    softcap: float | None = None
    suppressed: Tensor | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def is_linear(self) -> bool:
        return type(self.module) is nn.Linear

    @property
    def is_plain(self) -> bool:
        """Whether the raw logits of a plain head are the logits."""
        return self.is_linear and self.scale == 1.0 and self.softcap is None

    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def project(self, hidden: Tensor) -> Tensor:
        """Raw logits ``[n, vocabulary]`` in the compute dtype."""
        if self.is_linear:
            weight, bias = self.linear(compute_dtype(hidden))
            return F.linear(hidden.to(weight.dtype), weight, bias)
        with self.context():
            return self.module(hidden)[..., : self.vocabulary]

    def linear(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        """Weight ``[vocabulary, H]`` and bias of a plain head, cut to the vocabulary, in the compute dtype."""
        module: Any = self.module
        weight = module.weight[: self.vocabulary]
        bias = None if module.bias is None else module.bias[: self.vocabulary]
        if dtype is None:
            return weight, bias
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def finish(self, raw: Tensor) -> Tensor:
        """Scale, cap and suppress, in float32 (float64 stays)."""
        logits = wide(raw)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.suppressed is not None:
            logits = logits.index_fill(-1, self.suppressed.to(logits.device), IMPOSSIBLE)
        return logits

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.finish(self.project(hidden))


def wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is so already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def compute_dtype(hidden: Tensor) -> torch.dtype | None:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class Distribution(ABC):
    """A policy's distributions over the next step at N states (or at B × T of them, before `at`)."""

    @abstractmethod
    def at(self, index: Tensor) -> Distribution:
        """The N states at ``index [N]`` of the flattened B × T."""

    @abstractmethod
    def bytes_per_state(self) -> int:
        """Memory that one state takes while its chunk is open."""

    def bytes_kept(self) -> int:
        """What of it a chunk of the student keeps in memory, where this is a teacher."""
        return 0

    @abstractmethod
    def accumulator(self) -> GradientAccumulator:
        """Collects the gradient of a loss that is evaluated chunk by chunk."""

    @abstractmethod
    def chunk(self, states: slice) -> Any:
        """The family's chunk at some of the N states, without gradient; valid until others are prepared or opened."""

    def prepare(self, states: slice) -> None:  # noqa: B027  (only a vocabulary has something to prepare)
        """Does what is better done at once for a chunk, before pieces of it are opened."""

    def piece(self, count: int) -> int:
        """How many states of a chunk of ``count`` are opened together."""
        return count

    def to(self, device: torch.device | str) -> Distribution | None:
        """The same, with what it holds on another device; None where it holds nothing and is made when it is opened."""
        return None

    def only_at(self, states: Tensor) -> Distribution:
        """The same, where nobody reads what it says at the others than ``states [N]`` (bool)."""
        return self


class GradientAccumulator(ABC):
    """Opens chunks whose loss can be differentiated, and sums up the gradients of ``inputs`` in ``sums``."""

    inputs: list[Tensor]
    sums: list[Tensor]

    @property
    def gradients(self) -> Sequence[Tensor | None]:
        """None for an input that no chunk depended on, so that it is noticed."""
        return self.sums

    def prepare(self, states: slice) -> None:  # noqa: B027
        """As `Distribution.prepare`; each piece of the chunk is then opened and closed once, in order."""

    @abstractmethod
    def open(self, states: slice) -> Any: ...

    @abstractmethod
    def close(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` (a scalar that depends on the open chunk) and drop the chunk."""


class CategoricalChunk:
    """What a policy says at the n states of one piece; everything derived from its logits is computed once.

    Attributes:
        logits: ``[n, V]`` float32 (or float64), up to a constant per state.

    Args:
        owned: the logits have no other reader and no history: log-probabilities take their place.
    """

    def __init__(self, logits: Tensor, owned: bool = False) -> None:
        self.logits = logits
        self._known = {1.0: normalise_(logits.detach())} if owned else {}
        self._log_probs: dict[float, Tensor] = {}
        self._entropy: Tensor | None = None

    def known(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities and probabilities ``[n, V]`` of the logits divided by ``temperature``, without gradient.

        To be read only: others read them too.
        """
        if temperature not in self._known:
            with torch.no_grad():
                self._known[temperature] = normalise_(self.logits.detach() / temperature)
        return self._known[temperature]

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """``[n, V]`` log-softmax of the logits divided by ``temperature``, with gradient where the logits have one."""
        if not self.logits.requires_grad:
            return self.known(temperature)[0]
        if temperature not in self._log_probs:
            # whoever asks first may do so under no_grad (a weight, a target); the signal still needs the gradient
            with torch.enable_grad():
                self._log_probs[temperature] = _LogProbs.apply(self.logits, *self.known(temperature), temperature)
        return self._log_probs[temperature]

    def log_prob(self, action: Tensor) -> Tensor:
        """``[n]`` log-probability of the given ids ``[n]`` at temperature 1."""
        value: Tensor = _LogProb.apply(self.logits, *self.known(), action)
        return value

    def entropy(self) -> Tensor:
        """``[n]`` in nats, without gradient."""
        if self._entropy is None:
            log_probs, probs = self.known()
            self._entropy = -(probs * log_probs).sum(-1)
        return self._entropy

    def confidence(self) -> Tensor:
        """``[n]`` in [0, 1], without gradient: 1 − H / log V; 0 for a uniform distribution, 1 for a certain one."""
        return (1 - self.entropy() / math.log(self.logits.shape[-1])).clamp(0, 1)


def normalise_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[n, V]``, in place, and probabilities, with one exponential for both."""
    highest = logits.amax(-1, keepdim=True)
    probs = (logits - highest).exp_()
    total = probs.sum(-1, keepdim=True)
    return logits.sub_(highest.add_(total.log())), probs.div_(total)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_probs: Tensor, probs: Tensor, temperature: float) -> Tensor:
        ctx.probs, ctx.temperature = probs, temperature
        return log_probs.detach()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        (gradient,) = outputs
        inner = gradient - ctx.probs * gradient.sum(-1, keepdim=True)
        return inner.div_(ctx.temperature), None, None, None


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_probs: Tensor, probs: Tensor, action: Tensor) -> Tensor:
        ctx.probs, ctx.action = probs, action[:, None]
        return log_probs.gather(-1, ctx.action).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        weight = outputs[0][:, None]
        return (ctx.probs * -weight).scatter_add_(-1, ctx.action, weight), None, None, None


@dataclass
class Categorical(Distribution):
    """Hidden states ``[B, T, H]`` or ``[N, H]``, and the head that turns them into logits."""

    hidden: Tensor
    head: Head

    def __post_init__(self) -> None:
        self._prepared = slice(0, 0)
        self._raw: Tensor | None = None

    def at(self, index: Tensor) -> Categorical:
        return replace(self, hidden=self.hidden.reshape(-1, self.hidden.shape[-1])[index])

    def to(self, device: torch.device | str) -> Categorical:
        return replace(self, hidden=self.hidden.to(device))

    def bytes_per_state(self) -> int:
        # raw logits; of a piece, four tensors: log-probabilities, probabilities, contributions and their gradient
        dtype = compute_dtype(self.hidden) or self.hidden.dtype
        return self.head.vocabulary * (dtype.itemsize + 4 * 4 // PIECES)

    def bytes_kept(self) -> int:
        return self.bytes_per_state()

    def piece(self, count: int) -> int:
        return max(math.ceil(count / PIECES), SMALL_PIECE // (4 * self.head.vocabulary))

    def accumulator(self) -> GradientAccumulator:
        return _CategoricalGradient(self)

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Some ids after the other, with their weight and bias of a plain head in the compute dtype.

        All at once where that is float32: a cast, or a product before it is added to a float32 sum, takes memory.
        """
        weight, bias = (None if tensor is None else tensor.detach() for tensor in self.head.linear(None))
        assert weight is not None
        size = BLOCK if self._dtype.itemsize < 4 else len(weight)
        for start in range(0, len(weight), size):
            ids = slice(start, min(start + size, len(weight)))
            yield ids, weight[ids].to(self._dtype), None if bias is None else bias[ids].to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """In which a plain head is computed."""
        return compute_dtype(self.hidden) or self.head.linear(None)[0].dtype

    @torch.no_grad()
    def prepare(self, states: slice) -> None:
        if not self.head.is_linear:
            self._raw = self.head.project(self.hidden[states])
        else:
            hidden = self.hidden[states].detach().to(self._dtype)
            if self._raw is None or len(self._raw) < len(hidden):
                # one buffer for all chunks: blocks of this size go back to the system and cost page faults anew
                self._raw = hidden.new_empty(len(hidden), self.head.vocabulary)
            raw = self._raw[: len(hidden)]
            for ids, weight, bias in self.blocks():
                if bias is None:
                    torch.mm(hidden, weight.T, out=raw[:, ids])
                else:
                    torch.addmm(bias, hidden, weight.T, out=raw[:, ids])
            if self.head.is_plain:
                raw.clamp_(min=IMPOSSIBLE)
                if self.head.suppressed is not None:
                    raw.index_fill_(-1, self.head.suppressed.to(raw.device), IMPOSSIBLE)
        self._prepared = states

    def raw(self, states: slice) -> Tensor:
        """Raw logits ``[n, V]``, which may be overwritten."""
        if not self._prepared.start <= states.start < states.stop <= self._prepared.stop:
            self.prepare(states)
        assert self._raw is not None
        first = self._prepared.start
        return self._raw[states.start - first : states.stop - first]

    def chunk(self, states: slice) -> CategoricalChunk:
        with torch.no_grad():
            raw = self.raw(states)
            if self.head.is_plain:
                return CategoricalChunk(wide(raw), owned=True)
            return CategoricalChunk(self.head.finish(raw).clamp(min=IMPOSSIBLE))


class _CategoricalGradient(GradientAccumulator):
    def __init__(self, student: Categorical) -> None:
        self._student, self._head, self._hidden = student, student.head, student.hidden
        self._parameters = student.head.trainable()
        self.inputs = [student.hidden, *self._parameters]
        dtype = torch.promote_types(student.hidden.dtype, torch.float32)
        self.sums = [torch.zeros_like(tensor, dtype=dtype) for tensor in self.inputs]
        self._prepared = slice(0, 0)

    def prepare(self, states: slice) -> None:
        self._prepared = states
        if self._head.is_linear:
            self._student.prepare(states)
            return
        self._open_hidden = self._hidden[states].detach().requires_grad_()
        with torch.enable_grad():
            self._projected = self._head.project(self._open_hidden)
        self._gradient = torch.empty_like(self._projected)

    def open(self, states: slice) -> CategoricalChunk:
        if not self._prepared.start <= states.start < states.stop <= self._prepared.stop:
            self.prepare(states)
        self._states = states
        if self._head.is_plain:
            self._gradient_here = self._student.raw(states)
            self._leaf = wide(self._gradient_here).detach().requires_grad_()
            return CategoricalChunk(self._leaf, owned=True)
        if self._head.is_linear:
            raw = self._gradient_here = self._student.raw(states)
        else:
            first = self._prepared.start
            here = slice(states.start - first, states.stop - first)
            raw, self._gradient_here = self._projected[here], self._gradient[here]
        self._leaf = raw.detach().requires_grad_()
        return CategoricalChunk(self._head.finish(self._leaf).clamp(min=IMPOSSIBLE))

    def close(self, loss: Tensor) -> None:
        (gradient,) = torch.autograd.grad(loss, [self._leaf])
        del self._leaf
        self._gradient_here.copy_(gradient)
        if self._states.stop == self._prepared.stop:
            self._add_up()

    def _add_up(self) -> None:
        """From the logits' gradients of a whole chunk to those of the inputs."""
        if not self._head.is_linear:
            leaves = [self._open_hidden, *self._parameters]
            parts = torch.autograd.grad(self._projected, leaves, self._gradient)
            del self._projected, self._gradient, self._gradient_here
            self.sums[0][self._prepared] = parts[0]
            for total, part in zip(self.sums[1:], parts[1:], strict=True):
                total.add_(part)
            return
        raw = self._student.raw(self._prepared)
        hidden = self._hidden[self._prepared].detach().to(raw.dtype)
        sums: dict[Any, Tensor] = dict(zip(self._parameters, self.sums[1:], strict=True))
        of_weight, of_bias = sums.get(self._head.module.weight), sums.get(self._head.module.bias)
        for ids, weight, _ in self._student.blocks():
            part = raw[:, ids]
            self.sums[0][self._prepared] += part @ weight
            if of_bias is not None:
                of_bias[ids] += part.sum(0)
            if of_weight is not None and of_weight.dtype == part.dtype:
                of_weight[ids].addmm_(part.T, hidden)
            elif of_weight is not None:
                of_weight[ids] += part.T @ hidden


@dataclass
class Gaussian(Distribution):
    """Independent normals: ``mean [B, T, ...]`` or ``[N, ...]``, ``scale`` broadcastable to it (a scalar is fine)."""

    mean: Tensor
    scale: Tensor

    def at(self, index: Tensor) -> Gaussian:
        if self.scale.dim() == 0:
            return Gaussian(self.mean.flatten(0, 1)[index], self.scale)
        return Gaussian(self.mean.flatten(0, 1)[index], self.scale.expand_as(self.mean).flatten(0, 1)[index])

    def to(self, device: torch.device | str) -> Gaussian:
        return Gaussian(self.mean.to(device), self.scale.to(device))

    def bytes_per_state(self) -> int:
        return 4 * self.mean[0].numel() * self.mean.element_size()

    def accumulator(self) -> GradientAccumulator:
        return _GaussianGradient(self)

    def chunk(self, states: slice) -> Gaussian:
        return Gaussian(
            self.mean[states].detach(), (self.scale if self.scale.dim() == 0 else self.scale[states]).detach()
        )

    def log_prob(self, action: Tensor) -> Tensor:
        """``[n]`` log-density of ``action [n, ...]``, summed over the event."""
        return torch.distributions.Normal(self.mean, self.scale).log_prob(action).flatten(1).sum(1)

    def entropy(self) -> Tensor:
        """``[n]`` in nats, without gradient."""
        normal = torch.distributions.Normal(self.mean.detach(), self.scale.detach())
        return normal.entropy().expand_as(self.mean).flatten(1).sum(1)


class _GaussianGradient(GradientAccumulator):
    def __init__(self, student: Gaussian) -> None:
        self._student = student
        learnt_scale = student.scale.requires_grad
        self.inputs = [student.mean, student.scale] if learnt_scale else [student.mean]
        self.sums = [torch.zeros_like(tensor) for tensor in self.inputs]

    def open(self, states: slice) -> Gaussian:
        self._states, self._open = states, self._student.chunk(states)
        self._leaves = [self._open.mean, self._open.scale][: len(self.inputs)]
        for leaf in self._leaves:
            leaf.requires_grad_()
        return self._open

    def close(self, loss: Tensor) -> None:
        for total, part in zip(self.sums, torch.autograd.grad(loss, self._leaves), strict=True):
            if total.dim() == 0:
                total.add_(part)
            else:
                total[self._states] = part


@dataclass
class Lazy(Distribution):
    """Normals that are made when their chunk is opened, for policies that cost a forward pass per state: a denoiser at
    every noise level. Memory then grows with the chunk and not with the number of states.

    Attributes:
        make: from an index ``[n]`` into the flattened B × T states to `Gaussian` of n states.
        parameters: the trained ones among what it is made of; none for a teacher.
        size: bytes that one state takes while its chunk is open, activations included.
        index: ``[N]`` the states that are meant; None, before `at`: all of them.
        asked: ``[N]`` bool, where it is read; elsewhere it says nothing of worth. None: everywhere.
    """

    make: Callable[[Tensor], Gaussian]
    parameters: list[nn.Parameter]
    size: int
    index: Tensor | None = None
    asked: Tensor | None = None

    def only_at(self, states: Tensor) -> Lazy:
        return replace(self, asked=states)

    def at(self, index: Tensor) -> Lazy:
        return replace(self, index=index if self.index is None else self.index[index])

    def bytes_per_state(self) -> int:
        return self.size

    def accumulator(self) -> GradientAccumulator:
        return _LazyGradient(self)

    def chunk(self, states: slice) -> Gaussian:
        with torch.no_grad():
            return self.opened(states)

    def opened(self, states: slice) -> Gaussian:
        assert self.index is not None
        if self.asked is None or bool(self.asked[states].all()):
            return self.make(self.index[states])
        return self._partly(self.index[states], self.asked[states])

    def _partly(self, index: Tensor, asked: Tensor) -> Gaussian:
        # one state is made anyway, for the shape
        where = asked if bool(asked.any()) else torch.arange(len(index), device=index.device) < 1
        made = self.make(index[where])

        def spread(values: Tensor) -> Tensor:
            if not values.dim():
                return values
            wide = values.new_ones(len(index), *values.shape[1:])
            wide[where] = values
            return wide

        return replace(made, **{item.name: spread(getattr(made, item.name)) for item in fields(made)})


class _LazyGradient(GradientAccumulator):
    def __init__(self, student: Lazy) -> None:
        self._student = student
        self.inputs = list(student.parameters)
        self._reached = [False] * len(self.inputs)
        self.sums = [torch.zeros_like(parameter) for parameter in self.inputs]

    @property
    def gradients(self) -> Sequence[Tensor | None]:
        return [total if reached else None for total, reached in zip(self.sums, self._reached, strict=True)]

    def open(self, states: slice) -> Gaussian:
        return self._student.opened(states)

    def close(self, loss: Tensor) -> None:
        parts = torch.autograd.grad(loss, self.inputs, allow_unused=True)
        for i, part in enumerate(parts):
            if part is not None:
                self.sums[i].add_(part)
                self._reached[i] = True
