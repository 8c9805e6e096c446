"""The full vocabulary has less gradient variance than the sampled token.

Source: vOPD (2605.07865), Rethinking OPD (2604.13016).

Measured exactly: two random tabular policies with rollouts of 4 steps among 5 ids, whose gradients (of
KL(student‖teacher) over the vocabulary, and of the policy gradient of the sampled log-ratio) are averaged over all 625
rollouts by their probabilities. And on the models of the text quickstart: the variance of a rollout's gradient over 96
rollouts of the student. Variances are summed over parameters, and relative to that of the full vocabulary.
"""

from __future__ import annotations

import torch

from opd_lightning.objective import LogRatio, PolicyGradient, ReverseKL, Signal, Term

from .rollout_gradients import rollout_gradients
from .tabular import gradients, log_prob, moments, random_logits, rollouts, states_of
from .verdict import above, at_most

STEPS, IDS = 4, 5


def exact_moments(signals: dict[str, Signal], seed: int) -> dict[str, tuple[torch.Tensor, float]]:
    """Returns mean and variance of a rollout's gradient, over all rollouts of a random policy."""
    student, teacher = (random_logits(STEPS * (IDS + 1), IDS, 2 * seed + i) for i in range(2))
    actions = rollouts(STEPS, IDS)
    states = states_of(actions, IDS)
    probabilities = log_prob(student, actions, states).sum(1).exp()
    return {
        name: moments(gradients(Term(signal), student, {"teacher": teacher}, actions, states), probabilities)
        for name, signal in signals.items()
    }


def measure(seed: int) -> dict[str, float]:
    signals = {"full": ReverseKL(), "sampled": PolicyGradient(LogRatio(), clip=None, ratio="none")}
    exact = exact_moments(signals, seed)
    (full, variance_full), (sampled, variance_sampled) = exact["full"], exact["sampled"]
    spreads = {name: float(values.var(0).sum()) for name, values in rollout_gradients(signals, seed).items()}
    return {
        "means differ by": float((full - sampled).norm() / full.norm()),
        "full vocabulary, variance": 1.0,
        "sampled token, variance": variance_sampled / variance_full,
        "sampled token, variance on the quickstart": spreads["sampled"] / spreads["full"],
    }


RULES = [
    at_most("means differ by", 1e-9),
    above("sampled token, variance", "full vocabulary, variance"),
    above("sampled token, variance on the quickstart", "full vocabulary, variance"),
]
