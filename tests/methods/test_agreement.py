"""Agreement of several views, in loops over steps and trajectories."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.methods.agreement import StepAgreement, TrajectoryAgreement
from opd_lightning.objective import ReverseKL, Term
from tests.methods.world import SHAPE, World
from tests.objective.reference import close

NAMES = ("context_1", "context_2", "context_3")


def world() -> World:
    return World(3, ("teacher", *NAMES))


def test_steps_where_views_disagree_count_less():
    here, gamma = world(), 2.0
    values = torch.stack([here.log_prob(here.teachers[name]).detach() for name in NAMES])
    variance = torch.full(SHAPE, torch.nan, dtype=torch.float64)
    for b, t in here.mask.nonzero().tolist():
        seen = values[:, b, t]
        variance[b, t] = sum((x - seen.sum() / 3) ** 2 for x in seen) / 2
    scale = variance[here.mask].quantile(0.95)
    expected = (1 / (1 + gamma * (variance / scale).clamp(max=10))).clamp(min=0.01)
    found = here.values(StepAgreement(NAMES, gamma))
    close(found[here.mask], expected[here.mask], 1e-6)


def test_trajectories_on_which_views_disagree_count_less():
    here, gamma = world(), 3.0
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    for b in range(SHAPE[0]):
        means = [here.log_prob(here.teachers[name]).detach()[b, here.mask[b]].mean() for name in NAMES]
        middle = sum(means) / 3
        expected[b] = torch.exp(-gamma * sum((m - middle) ** 2 for m in means) / 3).clamp(min=1e-6)
    found = here.values(TrajectoryAgreement(NAMES, gamma))
    close(found[here.mask], expected[here.mask], 1e-6)


@pytest.mark.parametrize("kind", [StepAgreement, TrajectoryAgreement])
def test_views_that_agree_and_gamma_0_change_nothing(kind):
    here = world()
    plain = here.gradients(Term(ReverseKL(), normalizer="weights"))
    for weight in (kind(("context_1", "context_1"), 5.0), kind(NAMES, 0.0)):
        weighed = here.gradients(Term(ReverseKL(), weights=[weight], normalizer="weights"))
        for one, other in zip(weighed, plain, strict=True):
            close(one, other, 1e-6)


@pytest.mark.parametrize("kind", [StepAgreement, TrajectoryAgreement])
def test_refusals(kind):
    with pytest.raises(ValueError, match="it takes two"):
        kind(["alone"])
    with pytest.raises(ValueError, match="must be >= 0"):
        kind(NAMES, -1.0)
