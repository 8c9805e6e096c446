"""Dense float64 references, written from the formulas with plain torch, and small batches to compare on.

Nothing here uses the project's formulas: probabilities are kept as such, ids that are impossible on both sides are cut
out of the vocabulary rather than masked, supports are built row by row from sets of ids.

Shape legend: B trajectories, T steps, N trained steps, H hidden size, V possible ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from opd_lightning.distribution import Categorical, Head, Stream
from opd_lightning.trajectory import Trajectories

Formula = Callable[[Tensor, Tensor], Tensor]


def examples(count: int) -> settings:
    quiet = [HealthCheck.filter_too_much]
    return settings(max_examples=count, derandomize=True, database=None, suppress_health_check=quiet)


# -- batches ------------------------------------------------------------------------------------------------------


def batch(mask: list[list[int]], vocabulary: int, seed: int = 0, **changes: Any) -> Trajectories:
    """Random ids at every step; the behavior's log-probs are random too."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(mask), len(mask[0])
    return Trajectories(
        **{
            "observation": {},
            "actions": torch.randint(vocabulary, shape, generator=generator),
            "mask": torch.tensor(mask, dtype=torch.bool),
            "examples": [{"row": row} for row in range(shape[0])],
            "stopped": torch.ones(shape[0], dtype=torch.bool),
            "behavior_log_probs": torch.randn(shape, generator=generator) * 0.3 - 2,
            **changes,
        }
    )


def linear(rows: int, hidden: int, generator: torch.Generator, scale: float = 1.0, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(hidden, rows, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows, hidden, generator=generator, dtype=torch.float64) * scale)
        if bias:
            layer.bias.copy_(torch.randn(rows, generator=generator, dtype=torch.float64) * scale)
    return layer


@dataclass
class Policy:
    """Hidden states and a head, as a `Categorical` and as dense float64 logits of the possible ids."""

    hidden: Tensor  # [B, T, H]
    layer: nn.Linear
    vocabulary: int
    suppressed: tuple[int, ...] = ()

    @classmethod
    def random(
        cls,
        generator: torch.Generator,
        shape: tuple[int, int],
        vocabulary: int,
        hidden: int = 3,
        rows: int | None = None,
        scale: float = 1.0,
        suppressed: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float64,
    ) -> Policy:
        states = torch.randn(*shape, hidden, generator=generator, dtype=torch.float64).to(dtype)
        layer = linear(rows or vocabulary, hidden, generator, scale).to(dtype)
        return cls(states.requires_grad_(), layer, vocabulary, suppressed)

    def copy(self) -> Policy:
        layer = nn.Linear(*reversed(self.layer.weight.shape), dtype=self.layer.weight.dtype)
        layer.load_state_dict(self.layer.state_dict())
        return Policy(self.hidden.detach().clone().requires_grad_(), layer, self.vocabulary, self.suppressed)

    @property
    def distribution(self) -> Categorical:
        suppressed = torch.tensor(self.suppressed) if self.suppressed else None
        return Categorical(self.hidden, Head(self.layer, self.vocabulary, suppressed=suppressed))

    @property
    def teacher(self) -> Categorical:
        frozen = self.copy()
        frozen.layer.requires_grad_(False)
        return Categorical(frozen.hidden.detach(), frozen.distribution.head)

    @property
    def stream(self) -> Stream:
        return Stream(self.teacher)

    @property
    def possible(self) -> list[int]:
        return [v for v in range(self.vocabulary) if v not in self.suppressed]

    @property
    def inputs(self) -> list[Tensor]:
        return [self.hidden, *self.layer.parameters()]

    def logits(self, mask: Tensor) -> Tensor:
        """``[N, V]`` float64 at the trained steps."""
        raw = self.hidden[mask].double() @ self.layer.weight.double().T
        if self.layer.bias is not None:
            raw = raw + self.layer.bias.double()
        return raw[:, self.possible]

    def clear(self) -> None:
        for tensor in self.inputs:
            tensor.grad = None

    def gradients(self, loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, self.inputs, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(self.inputs, found, strict=True)]


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the largest entry, or of 1 if that is larger."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.isfinite(actual).all(), actual
    size = max(1.0, float(expected.abs().max()))
    assert float((actual - expected).abs().max()) <= tolerance * size, (actual, expected)


# -- divergences between two rows of log-probabilities [K], as K contributions ----------------------------------------


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """0·log 0 = 0."""
    a = log_a.exp()
    return torch.where(a > 0, a * torch.where(a > 0, log_a - log_b, 0.0), 0.0)


def log_of(m: Tensor) -> Tensor:
    return torch.where(m > 0, m, 1.0).log()


def kl_to_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """KL(a ‖ share·a + (1−share)·b)."""
    a, b = log_a.exp(), log_b.exp()
    return torch.where(a > 0, a * (torch.where(a > 0, log_a, 0.0) - log_of(share * a + (1 - share) * b)), 0.0)


def jsd(beta: float) -> Formula:
    def formula(log_p: Tensor, log_q: Tensor) -> Tensor:
        if beta in (0, 1):
            return kl(log_p, log_q) if beta else kl(log_q, log_p)
        return beta * kl_to_mixture(log_q, log_p, beta) + (1 - beta) * kl_to_mixture(log_p, log_q, 1 - beta)

    return formula


def alpha_divergence(alpha: float) -> Formula:
    def formula(log_p: Tensor, log_q: Tensor) -> Tensor:
        if alpha in (0, 1):
            return kl(log_q, log_p) if alpha else kl(log_p, log_q)
        p, q = log_p.exp(), log_q.exp()
        return ((alpha * log_q + (1 - alpha) * log_p).exp() - alpha * q - (1 - alpha) * p) / (alpha * (alpha - 1))

    return formula


def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() - log_q.exp()).abs() / 2


# -- supports -----------------------------------------------------------------------------------------------------


def top(log_probs: Tensor, k: int) -> set[int]:
    return set(log_probs.argsort(descending=True)[:k].tolist())


def on_support(
    log_p: Tensor, log_q: Tensor, action: int, of: str, k: int | None, remainder: str
) -> tuple[Tensor, Tensor]:
    """Two rows ``[V]`` on the support, ``[K]`` or ``[K+1]``."""
    everything = set(range(len(log_p)))
    if of == "full":
        kept = everything
    elif of == "sampled":
        kept = {action}
    elif of in ("intersection", "difference"):
        assert k is not None
        kept = top(log_p, k) & top(log_q, k) if of == "intersection" else top(log_p, k) ^ top(log_q, k)
    else:
        assert k is not None
        sides = {"teacher": (log_q,), "student": (log_p,), "union": (log_q, log_p)}[of]
        kept = set().union(*(top(side, k) for side in sides))
    rest, ids = sorted(everything - kept), sorted(kept)

    def restrict(log_probs: Tensor) -> Tensor:
        if remainder == "renormalize":
            return log_probs[ids] - log_probs[ids].logsumexp(0)
        if remainder == "tail" and rest:
            return torch.cat([log_probs[ids], log_probs[rest].logsumexp(0, keepdim=True)])
        return log_probs[ids]

    return restrict(log_p), restrict(log_q)


def dense(
    formula: Formula,
    student: Tensor,
    teacher: Tensor,
    actions: Tensor,
    of: str = "full",
    k: int | None = None,
    remainder: str = "tail",
    temperature: float = 1.0,
    clip: float | None = None,
) -> Tensor:
    """``[N]`` divergences at each state from logits ``[N, V]``; ``actions [N]`` index into V."""
    losses = []
    for p, q, action in zip(student, teacher, actions.tolist(), strict=True):
        rows = (p / temperature).log_softmax(0), (q / temperature).log_softmax(0)
        terms = formula(*on_support(*rows, action, of, k, remainder))
        losses.append((terms if clip is None else terms.clamp(max=clip)).sum())
    return torch.stack(losses)
