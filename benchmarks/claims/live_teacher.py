"""A live teacher is less stable than an averaged one.

Source: SDPO (2601.20802) and SDFT (2601.19897).

Measured on the text quickstart: the student, shown the worked solution, teaches the student that is not, by
KL(student‖teacher) on 32 rollouts, 60 updates at 3e-4. The teacher is the student as it is now, or an average that
follows it by 0.02 per update. Greedy accuracy on 128 held-out problems after 20, 40 and 60 updates; the fall is from
the highest of these, or from the 30.5 % before training, to the last.
"""

from __future__ import annotations

from opd_lightning.modalities.autoregressive.view import PromptView
from opd_lightning.objective import ReverseKL, Term
from opd_lightning.teacher import EMA, Live, Teacher, TeacherWeights

from .runs import Curve, make, train
from .verdict import above

UPDATES, EVERY, BEFORE = 60, 20, 30.5


def taught(weights: TeacherWeights, seed: int) -> Curve:
    teacher = Teacher(weights, PromptView(prompt="{{ solution }}?{{ prompt }}"))
    return train(make([Term(ReverseKL())], {"teacher": teacher}, rate=3e-4), seed, UPDATES, EVERY)


def fall(run: Curve) -> float:
    """Returns the points between the highest accuracy and the last."""
    return max(BEFORE, *(run.accuracy(update) for update in run.held_out)) - run.accuracy(UPDATES)


def measure(seed: int) -> dict[str, float]:
    live, average = taught(Live(), seed), taught(EMA(0.02), seed)
    return {
        "live teacher, % right": live.accuracy(UPDATES),
        "averaged teacher, % right": average.accuracy(UPDATES),
        "fall under a live teacher, points": fall(live),
        "fall under an averaged teacher, points": fall(average),
    }


RULES = [
    above("averaged teacher, % right", "live teacher, % right"),
    above("fall under a live teacher, points", "fall under an averaged teacher, points"),
]
TRIED = (
    "60 updates are too few for a collapse: under neither teacher does the accuracy fall. In 200 updates, with "
    "another loss, the averaged one collapsed, too (SDFT in [methods.md](methods.md))."
)
