"""A learned score in a checkpoint: its optimizer's moments stay, and its settings are those of now."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.modalities.diffusion.learned_score import Learner


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
