"""Forward KL bears staleness better than reverse KL.

Source: AsyncOPD (2606.24143): forward KL tolerates it, reverse KL should be computed anew by who trains.

Measured on letters: a network of width 8 imitates a random one of width 64 for 150 updates on 32 rollouts of 12
letters, rolled out with the weights of this moment or with those before the last 16 generation batches
(`max_staleness`). KL(teacher‖student) and KL(student‖teacher) over all letters, which are computed with the student of
this moment, and the policy gradient of the sampled log-ratio, without an importance ratio: with the student's log-prob
of this moment, or with that of acting. The number is how often student and teacher find the same letter the likeliest,
on 512 rollouts of the student; the cost is the difference that the lag makes.
"""

from __future__ import annotations

from opd_lightning.objective import ForwardKL, LogRatio, PolicyGradient, ReverseKL, Signal, Term

from .letters import distances, train
from .verdict import above

LAG, UPDATES, RATE = 16, 150, 0.03
SIGNALS: dict[str, Signal] = {
    "forward": ForwardKL(),
    "reverse": ReverseKL(),
    "sampled": PolicyGradient(LogRatio(), clip=None, ratio="none"),
    "sampled, scored when acting": PolicyGradient(LogRatio(against="behavior"), clip=None, ratio="none"),
}


def measure(seed: int) -> dict[str, float]:
    numbers = {}
    for name, signal in SIGNALS.items():
        fresh, stale = (distances(train([Term(signal)], seed, UPDATES, RATE, max_staleness=lag))[1] for lag in (0, LAG))
        numbers |= {f"{name}, % alike": fresh, f"{name}, cost of the lag": fresh - stale}
    return numbers


RULES = [
    above("reverse, cost of the lag", "forward, cost of the lag"),
    above("sampled, cost of the lag", "forward, cost of the lag"),
    above("sampled, scored when acting, cost of the lag", "forward, cost of the lag"),
]
TRIED = (
    "Over all letters, and with the student of this moment, the reverse KL loses little; what a lag harms is the "
    "estimate from sampled letters, and most of all one that was scored when acting. On the text quickstart a lag of "
    "8 costs the reverse KL nothing ([horizons.md](horizons.md))."
)
