"""Callbacks in the diffusion setting: they speak of steps, and these are denoising steps."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.callbacks import Curriculum, EarlyStopRollout, FreshnessControl, Piecewise, Stage
from opd_lightning.callbacks.early_stop import FirstSteps
from opd_lightning.modalities.diffusion import SDE, FlowMatching, Noising, VelocityMatching
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.rollout_settings import Rollout
from tests.tiny import Rows, fit, make_trainer, sgd
from tests.tiny_diffusion import make_rows


def widths(module, folder, callbacks, steps=4):
    """Denoising steps of the trajectories that each optimizer step trained."""
    seen, train = [], module.training_step

    def watch(batch, batch_idx):
        seen.append(int((batch.trajectories.channels["sigma"] > 0).sum(1).max()))
        return train(batch, batch_idx)

    module.training_step = watch
    fit(module, folder, make_rows(16), steps=steps, callbacks=callbacks)
    return seen


def test_a_curriculum_turns_the_number_of_steps(make, tmp_path):
    module = make(rollout=Rollout(batch_size=4, horizon=8))
    grows = Curriculum({"rollout.horizon": Piecewise({0: 1, 1: 2, 2: 4})})
    assert widths(module, tmp_path, [grows]) == [1, 2, 4, 4]


def test_early_stop_is_fewer_denoising_steps(make, tmp_path):
    module = make(rollout=Rollout(batch_size=4, horizon=8))
    assert widths(module, tmp_path, [EarlyStopRollout(FirstSteps(2))]) == [2] * 4


@pytest.mark.parametrize("anchor", [0.0, 0.1])
def test_stale_trajectories_count_less(make, anchor, tmp_path):
    rollout = Rollout(batch_size=4, horizon=3, max_staleness=1)
    module = make(sampler=SDE(), signal=ReverseKL(), rollout=rollout, optimizer=sgd(1e-4))
    trainer = fit(module, tmp_path, make_rows(16), steps=4, callbacks=[FreshnessControl(anchor=anchor)])
    assert trainer.callback_metrics["train/freshness/lag"] == 1
    assert 0 < trainer.callback_metrics["train/freshness/score"] < 1


def test_stages_from_images_to_the_students_own_states_resume_in_the_right_one(make, tmp_path):
    def run(steps, checkpoint=None):
        terms = [Term(FlowMatching(), None, source="dataset"), Term(VelocityMatching(), source="student")]
        module = make(
            objective=Objective(terms),
            rollout=Rollout(batch_size=4, horizon=2, behavior={"student": 0.5, "dataset": 0.5}),
            noising=Noising(0.5),
        )
        shares = ({"student": 0.0, "dataset": 1.0}, {"student": 1.0, "dataset": 0.0})
        off = ("objective.terms.VelocityMatching.coefficient", "objective.terms.FlowMatching.coefficient")
        stages = [
            Stage({"rollout.behavior": share, off[i]: 0.0, off[1 - i]: 1.0}, steps=2 if i == 0 else None)
            for i, share in enumerate(shares)
        ]
        trainer = make_trainer(tmp_path, steps=steps, callbacks=[Curriculum(stages=stages)])
        trainer.fit(module, datamodule=Rows(make_rows(16)), ckpt_path=checkpoint, weights_only=True)
        return trainer, module

    _, unbroken = run(4)
    trainer, _ = run(3)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    _, resumed = run(4, tmp_path / "part.ckpt")
    for mine, theirs in zip(resumed.student.parameters(), unbroken.student.parameters(), strict=True):
        assert torch.equal(mine, theirs)
