"""The overlap of the likeliest tokens predicts whether distillation succeeds.

Source: Rethinking OPD (2604.13016).

Measured on tabular policies, 64 states of 32 ids, 8 of which are right at each state. 11 teachers all take a right one
with probability 0.9, and differ in which: their share of it goes to the right ids by the student's order, from its
likeliest to its least likely one. KL(student‖teacher) on the student's 4 likeliest ids, renormalized (the paper's
loss), 200 steps of gradient descent at a rate of 1 for each state. Overlap is |top 4 of both| / 4 before training,
success the student's probability of a right id after it; Spearman's rank correlation over the teachers. The same with
the loss over all ids.
"""

from __future__ import annotations

import torch
from scipy.stats import spearmanr
from torch import Tensor

from opd_lightning.objective import ReverseKL, Support, Term

from .tabular import loss, random_logits
from .verdict import at_least

STATES, IDS, RIGHT, K, UPDATES = 64, 32, 8, 4, 200
SURE, TEACHERS = 0.9, 11


def teacher_of(student: Tensor, alike: float) -> Tensor:
    """Builds a teacher's logits: ``alike`` is 1 where it prefers right ids in the student's order, 0 in the opposite.

    The first 8 ids are the right ones; each has half of what the one before it in its order has.
    """
    order = student[:, :RIGHT].argsort(-1, descending=True)
    halves = 0.5 ** torch.arange(RIGHT, dtype=torch.float64)
    ranked = alike * halves + (1 - alike) * halves.flip(0)
    right = torch.zeros(STATES, RIGHT, dtype=torch.float64).scatter(-1, order, ranked.expand(STATES, -1))
    wrong = student[:, RIGHT:].softmax(-1)
    return torch.cat([SURE * right / right.sum(-1, keepdim=True), (1 - SURE) * wrong], -1).log()


def overlap(student: Tensor, teacher: Tensor) -> float:
    """Returns the mean share of ids that are among the 4 likeliest of both."""
    ids = student.topk(K).indices, teacher.topk(K).indices
    return float((ids[0][:, :, None] == ids[1][:, None]).any(-1).double().mean())


def success(signal: ReverseKL, student: Tensor, teacher: Tensor) -> float:
    """Trains a student, and returns its mean probability of a right id."""
    states, student = torch.arange(STATES)[:, None], student.clone()
    for _ in range(UPDATES):
        leaf = student.requires_grad_()
        value = loss([Term(signal)], leaf, {"teacher": teacher}, student.detach().argmax(-1)[:, None], states)
        student = (student - STATES * torch.autograd.grad(value, leaf)[0]).detach()
    return float(student.softmax(-1)[:, :RIGHT].sum(-1).mean())


def measure(seed: int) -> dict[str, float]:
    student = random_logits(STATES, IDS, seed)
    teachers = [teacher_of(student, i / (TEACHERS - 1)) for i in range(TEACHERS)]
    overlaps = [overlap(student, teacher) for teacher in teachers]
    paper = [success(ReverseKL(Support("student", K, "renormalize")), student, teacher) for teacher in teachers]
    full = [success(ReverseKL(), student, teacher) for teacher in teachers]
    return {
        "lowest overlap": min(overlaps),
        "highest overlap": max(overlaps),
        "success before": float(student.softmax(-1)[:, :RIGHT].sum(-1).mean()),
        "success at the lowest overlap": paper[overlaps.index(min(overlaps))],
        "success at the highest overlap": paper[overlaps.index(max(overlaps))],
        "rank correlation": float(spearmanr(overlaps, paper).statistic),
        "success over all ids, least": min(full),
        "rank correlation over all ids": float(spearmanr(overlaps, full).statistic),
    }


RULES = [at_least("rank correlation", 0.8), at_least("rank correlation over all ids", 0.8)]
TRIED = (
    "With the loss over all ids every teacher is learned from, and those that are less alike even better: the overlap "
    "tells what a loss on the student's likeliest ids can reach, and not what a teacher is worth."
)
