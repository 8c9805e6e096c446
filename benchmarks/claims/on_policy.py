"""On-policy distillation beats SFT at equal updates and at equal tokens.

Source: GKD (2306.13649).

Measured on the text quickstart, from the same student (30.5 % of 256 held-out sums): 60 updates on 32 texts each, new
problems in each. OPD trains KL(student‖teacher) on what the student writes, SFT the cross entropy of what the teacher
writes. Accuracy is that of greedy texts on 128 held-out problems. Equal tokens are the fewer of the two runs' generated
tokens; the other run's accuracy there lies on the line between two validations. And on letters, where all texts are
equally long: a network of width 8 learns from one of width 64 for 150 updates on 32 texts each; how often both find the
same letter the likeliest, on 512 texts of the student. There KL(teacher‖student) on the teacher's texts tells apart
what the texts do and what the loss does.
"""

from __future__ import annotations

from opd_lightning.objective import CrossEntropy, ForwardKL, ReverseKL, Term

from . import letters
from .runs import full_rollouts, make, train
from .verdict import above

UPDATES, EVERY = 60, 20


def on_quickstart(seed: int) -> dict[str, float]:
    opd = full_rollouts(seed)
    sft = train(make([Term(CrossEntropy())], behavior={"teacher": 1.0}), seed, UPDATES, EVERY)
    tokens = min(opd.tokens(UPDATES), sft.tokens(UPDATES))
    halfway = {f"{name}, % right after 40 updates": run.accuracy(40) for name, run in (("OPD", opd), ("SFT", sft))}
    return {
        **halfway,
        "OPD, % right after 60 updates": opd.accuracy(UPDATES),
        "SFT, % right after 60 updates": sft.accuracy(UPDATES),
        "OPD, % right at equal tokens": opd.accuracy_at(tokens),
        "SFT, % right at equal tokens": sft.accuracy_at(tokens),
        "equal tokens, thousands": tokens,
    }


def on_letters(seed: int) -> dict[str, float]:
    def alike(term: Term, actor: str) -> float:
        return letters.distances(letters.train([term], seed, 150, 0.03, behavior={actor: 1.0}))[1]

    return {
        "OPD on letters, % alike": alike(Term(ReverseKL()), "student"),
        "SFT on letters, % alike": alike(Term(CrossEntropy()), "teacher"),
        "KL on the teacher's letters, % alike": alike(Term(ForwardKL()), "teacher"),
    }


def measure(seed: int) -> dict[str, float]:
    return on_quickstart(seed) | on_letters(seed)


RULES = [
    above("OPD, % right after 60 updates", "SFT, % right after 60 updates"),
    above("OPD, % right at equal tokens", "SFT, % right at equal tokens"),
    above("OPD on letters, % alike", "SFT on letters, % alike"),
]
TRIED = (
    "On the quickstart twice as many texts for each update, 200 updates and 200 problems were tried besides "
    "([methods.md](methods.md)): OPD is then ahead on the way, by 11 points after 100 updates on 200 problems, and "
    "both meet in the end. The teacher makes no mistakes there, and its texts hardly differ from the student's."
)
