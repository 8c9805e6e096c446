"""CategoricalChunk: a policy over a vocabulary, while its logits exist.

Shape legend: n states of one piece, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class CategoricalChunk:
    """Distributions at the n states of one piece; whatever is derived from the logits is computed once.

    Args:
        logits: ``[n, V]`` float32 (or float64), up to a constant per state; or what computes them when they are first
            read, so that whoever reads hidden states alone needs no head.
        owned: the logits have no other reader and no history: log-probabilities take their place.
        layers: hidden states ``[n, H]`` by number of the layer, those that parts of the objective ask for.
    """

    def __init__(
        self, logits: Tensor | Callable[[], Tensor], owned: bool = False, layers: Mapping[int, Tensor] | None = None
    ) -> None:
        self._given, self._owned = logits, owned
        self.layers = layers or {}
        self._known: dict[float, tuple[Tensor, Tensor]] = {}
        self._log_probs: dict[float, Tensor] = {}
        self._entropy: Tensor | None = None

    @cached_property
    def logits(self) -> Tensor:
        """Logits ``[n, V]``, up to a constant per state."""
        logits = self._given if isinstance(self._given, Tensor) else self._given()
        if self._owned:
            self._known[1.0] = normalize_(logits.detach())
        return logits

    def known(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities and probabilities ``[n, V]`` of the logits divided by ``temperature``, no gradient.

        To be read only: all readers share them.
        """
        logits = self.logits  # which may know them already
        if temperature not in self._known:
            with torch.no_grad():
                self._known[temperature] = normalize_(logits.detach() / temperature)
        return self._known[temperature]

    def log_probs(self, temperature: float = 1.0) -> Tensor:
        """Returns log-probabilities ``[n, V]`` at ``temperature``, with gradient where the logits have one."""
        if not self.logits.requires_grad:
            return self.known(temperature)[0]
        if temperature not in self._log_probs:
            # the first reader may be under no_grad (a weight, a target); the signal still needs the gradient
            with torch.enable_grad():
                self._log_probs[temperature] = _LogProbs.apply(self.logits, *self.known(temperature), temperature)
        return self._log_probs[temperature]

    def log_prob(self, action: Tensor) -> Tensor:
        """Returns the log-probability ``[n]`` of the ids ``action [n]`` at temperature 1."""
        value: Tensor = _LogProb.apply(self.logits, *self.known(), action)
        return value

    def entropy(self) -> Tensor:
        """Returns the entropy ``[n]`` in nats, without gradient."""
        if self._entropy is None:
            log_probs, probs = self.known()
            self._entropy = -(probs * log_probs).sum(-1)
        return self._entropy

    def confidence(self) -> Tensor:
        """Returns 1 − H / log V ``[n]``, in [0, 1] from uniform to certain, without gradient."""
        return (1 - self.entropy() / math.log(self.logits.shape[-1])).clamp(0, 1)  # rounding leaves [0, 1]


def normalize_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Computes log-probabilities ``[n, V]``, in place, and probabilities, with one exponential for both."""
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
        # of log-softmax: g − p·Σg; recomputing it from p keeps no graph over the vocabulary
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
        # one-hot(action) − p, without the one-hot
        return (ctx.probs * -weight).scatter_add_(-1, ctx.action, weight), None, None, None
