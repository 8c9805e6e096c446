"""A learned score in a checkpoint: its optimizer's moments stay, and its settings are those of now."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.modalities.diffusion.learned_score import Learner
from opd_lightning.optimizer_step import OptimizerStep
from tests.modalities.diffusion.test_setting import matched, on_policy


def learner(optimizer=torch.optim.AdamW, **settings) -> Learner:
    torch.manual_seed(0)
    made = Learner(torch.nn.Linear(3, 2), lambda parameters: optimizer(parameters, **settings))
    made.model(torch.ones(1, 3)).sum().backward()
    made.optimizer.step()
    return made


def test_another_rate_takes_effect_and_moments_stay():
    state, other = learner(lr=0.1).state_dict(), learner(lr=0.001, weight_decay=0.2)
    other.load_state_dict(state)
    (group,) = other.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.001, 0.2)
    kept = state["_extra_state"]["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(other.optimizer.state[other.model.weight]["exp_avg"], kept)


def test_another_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"LearnedScore\.optimizer was .*AdamW in the checkpoint and is now .*SGD"):
        learner(torch.optim.SGD, lr=0.1).set_extra_state(learner(lr=0.1).get_extra_state())


def test_a_step_that_is_begun_again_teaches_it_once():
    before = learner(lr=0.1)
    before.learned_at = 7
    after = learner(lr=0.1)
    after.load_state_dict(before.state_dict())
    assert after.restored_at == 7
    assert learner(lr=0.1).restored_at == -1


def test_where_a_rank_has_nothing_to_learn_from_no_rank_learns(make, pipeline):
    """Its gradients are averaged: a rank that left early would let the others wait for ever."""
    module = matched(make, pipeline)
    score, step = module.teachers["fake"].weights, OptimizerStep([on_policy(module, 2)])

    class TwoRanks:
        def __init__(self, elsewhere: int) -> None:
            self.elsewhere, self.averaged = elsewhere, 0

        def gather_objects(self, value):
            return [value, self.elsewhere]

        def mean(self, tensor):
            self.averaged += 1
            return tensor

    idle, busy = TwoRanks(0), TwoRanks(2)
    assert score.before_update("fake", step, module, idle, 0) is None
    assert idle.averaged == 0
    assert score.before_update("fake", step, module, busy, 0) is not None
    assert busy.averaged
