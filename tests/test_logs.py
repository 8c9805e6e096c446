"""What was not recorded since the last logged step is absent from the log."""

from __future__ import annotations

import lightning as L
import pytest
from lightning.pytorch.loggers.logger import Logger

from opd_lightning.checkpoint import Checkpoint
from opd_lightning.objective import CrossEntropy, Objective, ReverseKL, Term
from opd_lightning.rollout_settings import Rollout
from tests.tiny import LongerIsBetter, Rows, make_trainer


class Log(Logger):
    """Keeps what it is given, by step."""

    name, version = "log", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics, step=None):
        self.steps.setdefault(step + 1, {}).update(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


class At(L.Callback):
    """Does something after some optimizer steps."""

    def __init__(self, *steps: int, act) -> None:
        self.steps, self.act = steps, act

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch.is_last and trainer.global_step in self.steps:
            self.act(pl_module)


def logged(world, folder, *callbacks, steps=6, every=1, **settings):
    objective = Objective([Term(ReverseKL()), Term(CrossEntropy(), teacher=None)])
    module = world.module(world.teacher, objective, **settings)
    log = Log()
    world.fit(module, folder, steps=steps, logger=log, callbacks=list(callbacks), log_every_n_steps=every)
    return log.steps


def test_a_teacher_that_is_asked_no_more_is_logged_no_more(world, tmp_path):
    def turn(to):
        return lambda module: setattr(module.objective.terms[0], "coefficient", to)

    steps = logged(world, tmp_path, At(2, act=turn(0.0)), At(4, act=turn(1.0)))
    for step, metrics in steps.items():
        is_asked = step not in (3, 4)
        assert any(name.startswith("train/teacher/") for name in metrics) == is_asked, step
        assert ("train/loss/ReverseKL" in metrics) == is_asked, step
        assert "train/loss/CrossEntropy" in metrics
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]


def test_what_is_recorded_with_rollouts_is_logged_with_their_first_step_only(world, tmp_path):
    rollout = Rollout(batch_size=8, micro_batch_size=4, horizon=6)
    steps = logged(world, tmp_path, rollout=rollout, reward=LongerIsBetter())
    assert [("train/reward" in metrics) for _, metrics in sorted(steps.items())] == [True, False] * 3


@pytest.mark.parametrize(("every", "expected"), [(1, {1, 4}), (2, {2, 4}), (3, {3, 6})])
def test_what_a_callback_logs_now_and_then_is_logged_once(every, expected, world, tmp_path):
    steps = logged(world, tmp_path, At(1, 4, act=lambda module: module.log("mine", 1.0)), every=every)
    assert {step for step, metrics in steps.items() if "mine" in metrics} == expected


def test_what_is_averaged_over_an_epoch_stays(world, tmp_path):
    """As a user asks Lightning for it."""

    def log(module):
        module.log("mean", float(module.global_step), on_step=False, on_epoch=True, batch_size=1)

    log_steps = logged(world, tmp_path, At(1, 2, 3, act=log), steps=3)  # an epoch is three generation batches of 8 rows
    assert [metrics["mean"] for metrics in log_steps.values() if "mean" in metrics] == [2.0]


def test_a_run_that_goes_on_from_its_end_logs_the_steps_that_an_unbroken_one_does(world, tmp_path):
    log, rows = Log(), Rows(world.make_rows(8))  # an epoch is one optimizer step
    for steps, checkpoint in ((3, None), (6, tmp_path / "checkpoints" / "last.ckpt")):
        module = world.module(world.teacher, rollout=Rollout(batch_size=8, horizon=4))
        settings = {"logger": log, "log_every_n_steps": 2, "enable_checkpointing": True}
        trainer = make_trainer(tmp_path, steps, callbacks=[Checkpoint()], **settings)
        trainer.fit(module, datamodule=rows, ckpt_path=checkpoint, weights_only=True)
    assert sorted(log.steps) == [2, 4, 6]
