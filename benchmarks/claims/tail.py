"""A divergence on the likeliest ids that drops the rest breaks.

Source: The Many Faces of OPD (2605.11182), SDPO (2601.20802).

Measured on tabular policies, 64 states of 32 ids: KL(student‖teacher) on the student's 4 likeliest ids, with the rest
as one tail, renormalized, with log p held (`stop`), or dropped. First the gradient where the student is the teacher,
which should be 0. Then 400 steps of gradient descent (rate 1 for each state), from a student that is the teacher but
for noise of 0.5 on its logits; the divergence over all ids, before and after.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from opd_lightning.objective import ReverseKL, Support, Term

from .tabular import loss, random_logits
from .verdict import above, at_least, at_most

STATES, IDS, K, UPDATES, RATE = 64, 32, 4, 400, 1.0
Remainder = Literal["tail", "renormalize", "drop", "stop"]


def value(signal: ReverseKL, student: Tensor, teacher: Tensor) -> Tensor:
    """Evaluates a signal as the mean over all states."""
    states = torch.arange(STATES)[:, None]
    return loss([Term(signal)], student, {"teacher": teacher}, student.detach().argmax(-1)[:, None], states)


def slope(signal: ReverseKL, student: Tensor, teacher: Tensor) -> Tensor:
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(value(signal, leaf, teacher), leaf)[0]


def measure(seed: int) -> dict[str, float]:
    teacher = random_logits(STATES, IDS, 2 * seed, 2.0)
    start = teacher + random_logits(STATES, IDS, 2 * seed + 1, 0.5)
    remainders: tuple[Remainder, ...] = ("tail", "renormalize", "stop", "drop")
    signals = {remainder: ReverseKL(Support("student", K, remainder)) for remainder in remainders}
    numbers = {
        f"{name}, gradient at the teacher": float(slope(s, teacher, teacher).norm()) for name, s in signals.items()
    }
    numbers["divergence before"] = float(value(ReverseKL(), start, teacher))
    for name, signal in signals.items():
        student = start.clone()
        for _ in range(UPDATES):
            student = student - RATE * STATES * slope(signal, student, teacher)
        numbers[f"{name}, divergence after"] = float(value(ReverseKL(), student, teacher))
    return numbers


RULES = [
    at_most("tail, gradient at the teacher", 1e-9),
    at_least("drop, gradient at the teacher", 1e-3),
    above("divergence before", "tail, divergence after"),
    above("drop, divergence after", "divergence before"),
]
