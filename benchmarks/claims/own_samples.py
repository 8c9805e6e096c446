"""SFT on own samples forgets less than SFT on given ones.

Source: SDFT (2601.19897).

Measured with two tasks in sequence: a network of width 32 says one of 16 words to a prompt, of which 4 are right, and
has 32 prompts for each task. It learns the first from given right answers, then the second, either from given answers
(for each prompt one right word, drawn at random) or from its own that are right (32 draws a prompt and update,
`Outcome`), by cross entropy until 90 % of what it says to the second task's prompts is right. Forgotten is what it then
says wrong to the first task's prompts and did not before, in points, and KL(before‖after) there, in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opd_lightning import Categorical, Head
from opd_lightning.objective import CrossEntropy, Objective, Outcome, Term

from .tabular import trajectories
from .verdict import above, at_least

PROMPTS, WORDS, RIGHT, WIDTH, DRAWS = 32, 16, 4, 32, 32
GOAL, MOST, RATE = 0.9, 4000, 0.003


class Task:
    """Prompts ``[P, W]``, the words that are right ``[P, V]`` bool, and a given answer to each ``[P]``."""

    def __init__(self, generator: torch.Generator) -> None:
        self.prompts = torch.randn(PROMPTS, WIDTH, generator=generator)
        ranks = torch.rand(PROMPTS, WORDS, generator=generator).argsort(-1)
        self.right, self.given = ranks < RIGHT, ranks.argmin(-1)


class Speaker(nn.Module):
    """Network with one hidden layer, as a body and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), nn.Linear(WIDTH, WORDS)

    def log_probs(self, prompts: Tensor) -> Tensor:
        """Returns ``[P, V]``."""
        return self.head(self.body(prompts)).log_softmax(-1)

    def success(self, task: Task) -> float:
        """Returns how likely right words are, on average over prompts."""
        with torch.no_grad():
            return float((self.log_probs(task.prompts).exp() * task.right).sum(-1).mean())


def learn(speaker: Speaker, task: Task, from_own: bool, generator: torch.Generator) -> int:
    """Trains until the goal is reached; returns the updates that it took."""
    weights = [Outcome()] if from_own else []
    objective = Objective([Term(CrossEntropy(), teacher=None, weights=weights, normalizer="weights")])
    optimizer = torch.optim.Adam(speaker.parameters(), lr=RATE)
    for update in range(MOST):
        if speaker.success(task) >= GOAL:
            return update
        words = task.given[:, None]
        if from_own:
            with torch.no_grad():
                words = torch.multinomial(speaker.log_probs(task.prompts).exp(), DRAWS, True, generator=generator)
        actions = words.reshape(-1, 1)
        reward = task.right.gather(1, words).float().flatten()
        batch = trajectories(actions, torch.zeros(actions.shape), reward=reward)
        hidden = speaker.body(task.prompts).repeat_interleave(words.shape[1], 0)[:, None]
        optimizer.zero_grad()
        objective(Categorical(hidden, Head(speaker.head, WORDS)), {}, batch).loss.backward()
        optimizer.step()
    return MOST


def measure(seed: int) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, from_own in (("given", False), ("own", True)):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        first, second = Task(generator), Task(generator)
        speaker = Speaker()
        learn(speaker, first, False, generator)
        with torch.no_grad():
            before, success = speaker.log_probs(first.prompts), speaker.success(first)
            numbers["second task before, % right"] = 100 * speaker.success(second)
        updates = learn(speaker, second, from_own, generator)
        with torch.no_grad():
            after = speaker.log_probs(first.prompts)
        numbers[f"{name}, % right of the second task"] = 100 * speaker.success(second)
        numbers[f"{name}, updates"] = updates
        numbers[f"{name}, points forgotten"] = 100 * (success - speaker.success(first))
        numbers[f"{name}, divergence on the first task"] = float((before.exp() * (before - after)).sum(-1).mean())
    return numbers


RULES = [
    at_least("own, % right of the second task", 100 * GOAL),
    above("given, points forgotten", "own, points forgotten"),
    above("given, divergence on the first task", "own, divergence on the first task"),
]
