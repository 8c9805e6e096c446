"""A wrong privilege, such as someone else's solution, hurts.

Source: a control for OPSD (2601.18734); no paper's number for it was read.

Measured on the text quickstart: the student before training teaches the student, shown the worked solution of the
problem, or that of another problem (the rows' solutions moved by one). KL(teacher‖student) on 32 rollouts of the
student, 40 updates at 3e-4; greedy accuracy on 128 held-out problems, which nobody is shown a solution of.
"""

from __future__ import annotations

from typing import Any

from opd_lightning.modalities.autoregressive.view import PromptView
from opd_lightning.modalities.text.quickstart import sums
from opd_lightning.objective import ForwardKL, Term
from opd_lightning.teacher import Initial, Teacher

from .runs import make, train
from .verdict import above, at_most

UPDATES, BEFORE = 40, 30.5


def problems(seed: int) -> list[dict[str, Any]]:
    """Draws problems, each with the solution of the next one in a column ``other``."""
    rows = sums(4000, seed=seed)
    return [{**row, "other": other["solution"]} for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]


def taught(column: str, seed: int) -> float:
    """Returns the accuracy after training by the student that is shown a column."""
    view = PromptView(prompt=f"{{{{ {column} }}}}?{{{{ prompt }}}}")
    module = make([Term(ForwardKL())], {"teacher": Teacher(Initial(), view)}, rate=3e-4)
    return train(module, seed, UPDATES, rows=problems(seed)).accuracy(UPDATES)


def measure(seed: int) -> dict[str, float]:
    return {"own solution, % right": taught("solution", seed), "another's solution, % right": taught("other", seed)}


RULES = [
    above("own solution, % right", "another's solution, % right"),
    at_most("another's solution, % right", BEFORE),
]
