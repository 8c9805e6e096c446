"""What tests of heads and distributions share: a small vocabulary, and the dense loss to compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opd_lightning.distribution import Categorical, Head, Stream
from opd_lightning.objective import Objective, ReverseKL, Term
from tests.objective.reference import batch, close, linear

B, T, H, V = 2, 4, 5, 11
MASK = [[1, 1, 1, 0], [1, 0, 1, 1]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def states(seed: int, dtype: torch.dtype = torch.float64, width: int = H) -> Tensor:
    return torch.randn(B, T, width, generator=seeded(seed), dtype=torch.float64).to(dtype)


def teacher() -> tuple[Categorical, Tensor]:
    """A teacher of another width and padding, and its dense float64 log-probs ``[N, V]``."""
    layer, hidden = linear(V + 3, H + 1, seeded(9)), states(8, width=H + 1)
    dense = F.linear(hidden, layer.weight, layer.bias)[torch.tensor(MASK).bool(), :V].log_softmax(-1).detach()
    return Categorical(hidden, Head(layer.requires_grad_(False), V)), dense


def train(student: Categorical, against: Categorical, chunk_steps: int | None = 2) -> Tensor:
    objective = Objective([Term(ReverseKL())], chunk_steps=chunk_steps)
    return objective(student, {"teacher": Stream(against)}, batch(MASK, V))[0]


def expected_loss(logits: Tensor, log_q: Tensor) -> Tensor:
    """From dense logits ``[B, T, V]``."""
    log_p = logits[torch.tensor(MASK).bool()].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def compare(loss: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float = 1e-7) -> None:
    close(loss, expected, max(tolerance, 1e-6))
    for actual, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        close(actual, wanted, tolerance)
