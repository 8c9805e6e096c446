"""Length grows without a reference, and StableOPD holds it.

Source: StableOPD (2604.08527): a repeated token gets the best advantage.

Measured on a tabular policy whose state is the id before: 6 letters, one that repeats, and one that stops; rollouts end
after 64 steps. The teacher is made as the paper finds its teachers: it hardly begins to repeat (0.01; the student
0.05), but goes on repeating with 0.99 (the student 0.5). 300 updates of Adam at 0.02 on 64 rollouts: the policy
gradient of the sampled log-ratio alone, or with the overlay `stable_opd`'s two other terms, the reference KL (0.05) and
the cross entropy (0.1) of given rollouts, a fifth of the batch, in which nothing repeats. Growth is the mean length of
20 updates over that of the student before, where it is longest. Besides, the first on the text quickstart, 20 updates
at 1e-3, rollouts of up to 96 tokens, and windows of 5 updates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lightning.objective import CrossEntropy, LogRatio, PolicyGradient, ReverseKL, Term

from . import runs
from .tabular import loss
from .verdict import above, at_least, at_most

LETTERS, HORIZON, BATCH, GIVEN = 6, 64, 64, 13
AGAIN, STOP, IDS = LETTERS, LETTERS + 1, LETTERS + 2
UPDATES, WINDOW, RATE = 300, 20, 0.02
QUICKSTART_UPDATES = 20


def policy(begins: float, goes_on: float, stops: float, stops_repeating: float) -> Tensor:
    """Builds the logits ``[S, V]`` of a policy by how likely it repeats and stops; the first state is the start."""
    table = torch.empty(IDS + 1, IDS, dtype=torch.float64)
    for state, (again, stop) in enumerate([(begins, stops)] * (LETTERS + 1) + [(goes_on, stops_repeating)] * 2):
        table[state] = (1 - again - stop) / LETTERS
        table[state, AGAIN], table[state, STOP] = again, stop
    return table.log()


BEFORE, TEACHER = policy(0.05, 0.5, 0.12, 0.1), policy(0.01, 0.99, 0.12, 0.001)
NEVER_AGAIN = policy(1e-9, 0.5, 0.12, 0.1)


def act(logits: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Returns actions, states and mask ``[B, 64]`` of rollouts."""
    probabilities, state = logits.detach().softmax(-1), torch.zeros(count, dtype=torch.long)
    actions, states, mask, running = [], [], [], torch.ones(count, dtype=torch.bool)
    for _ in range(HORIZON):
        action = torch.multinomial(probabilities[state], 1, generator=generator)[:, 0]
        actions.append(action)
        states.append(state)
        mask.append(running)
        running, state = running & (action != STOP), action + 1
    return torch.stack(actions, 1), torch.stack(states, 1), torch.stack(mask, 1)


def lengths(terms: list[Term], given: int, seed: int) -> list[float]:
    """Trains, and returns the mean length of the student's rollouts in every update."""
    student = BEFORE.clone().requires_grad_()
    optimizer = torch.optim.Adam([student], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    teachers, found = {"teacher": TEACHER, "initial": BEFORE}, []
    source = torch.tensor([0] * (BATCH - given) + [1] * given)
    for _ in range(UPDATES):
        parts = [act(student, BATCH - given, generator)] + ([act(NEVER_AGAIN, given, generator)] if given else [])
        actions, states, mask = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        facts = {"mask": mask, "source": source, "sources": ("student", "dataset")}
        value = loss(terms, student, teachers, actions, states, **facts)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(float(mask[: BATCH - given].sum(1).double().mean()))
    return found


def longest(values: list[float], window: int = WINDOW) -> float:
    """Returns the highest mean over a window of updates."""
    return max(sum(values[i : i + window]) / window for i in range(len(values) - window + 1))


def mean_length(logits: Tensor, seed: int) -> float:
    """Returns the mean length of 4096 rollouts."""
    return float(act(logits, 4096, torch.Generator().manual_seed(10**6 + seed))[2].sum(1).double().mean())


def measure(seed: int) -> dict[str, float]:
    sampled = PolicyGradient(LogRatio())
    alone = lengths([Term(sampled, source="student")], 0, seed)
    stable = lengths(
        [
            Term(sampled, source="student", name="distillation"),
            Term(CrossEntropy(), None, source="dataset", coefficient=0.1, name="golden"),
            Term(ReverseKL(), "initial", source="student", coefficient=0.05, name="reference"),
        ],
        GIVEN,
        seed,
    )
    before = mean_length(BEFORE, seed)
    quickstart = runs.train(runs.make([Term(sampled)], horizon=96), seed, QUICKSTART_UPDATES)
    tokens = [step["tokens"] for step in quickstart.steps]
    return {
        "steps before": before,
        "steps of the teacher": mean_length(TEACHER, seed),
        "without a reference, growth": longest(alone) / before,
        "StableOPD, growth": longest(stable) / before,
        "without a reference, steps at the end": sum(alone[-WINDOW:]) / WINDOW,
        "StableOPD, steps at the end": sum(stable[-WINDOW:]) / WINDOW,
        "growth on the quickstart": longest(tokens, 5) / tokens[0],
    }


RULES = [
    at_least("without a reference, growth", 1.5),
    above("without a reference, growth", "StableOPD, growth"),
    at_most("StableOPD, growth", 1.25),
    at_least("growth on the quickstart", 1.5),
]
TRIED = (
    "The policy gradient of the immediate log-ratio has its zero where the student is its teacher in every state, so "
    "the student grows to the teacher's length and no further, with StableOPD's terms as without. Tried besides, with "
    "one seed: students whose states share a network of 1 or 2 units, at rates of 0.005 and 0.03, whose lengths went "
    "the same way. What makes the paper's rollouts run away, states that its teachers never saw, is not in this "
    "miniature."
)
