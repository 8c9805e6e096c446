"""Data modules of one's own: what is looked at before training, and what is said where it can't be."""

from __future__ import annotations

import lightning as L
import pytest

from opd_lightning.callbacks import Curriculum
from opd_lightning.callbacks.curriculum import Linear
from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.splits import rows_of
from tests.callbacks import toy
from tests.tiny import make_trainer


class Foreign(L.LightningDataModule):
    """Hands over its rows in its dataloader, and nowhere else."""

    def train_dataloader(self):
        return self.trainer.lightning_module.rollout_loader(toy.make_rows())


class Open(Foreign):
    """Says that it has training rows, and none to validate on."""

    train, validation = toy.make_rows(), None


def said(recwarn) -> list[str]:
    return [text for warning in recwarn if "is skipped" in (text := str(warning.message))]


def test_what_is_skipped_is_said(tmp_path, recwarn):
    module = toy.make_module(evaluation=Evaluation(before=True))
    later = Curriculum({"rollout.horizon": Linear(2, 4, 2)})
    make_trainer(tmp_path, steps=1, callbacks=[later]).fit(module, datamodule=Foreign())
    found = said(recwarn)
    for what in ("the table of what is made of the first row", "model.evaluation.before", "the check of columns"):
        assert any(line.startswith(what) for line in found), (what, found)
    assert all("Foreign has no attribute" in line and "docs/rows.md" in line for line in found)


def test_rows_that_are_not_there_are_nothing_to_say(tmp_path, recwarn):
    module = toy.make_module(evaluation=Evaluation(before=True))
    make_trainer(tmp_path, steps=1).fit(module, datamodule=Open())
    assert not said(recwarn)


def test_a_trainer_without_a_data_module_is_named(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.warns(UserWarning, match="The check is skipped: the trainer has no data module"):
        assert rows_of(trainer, "train", "The check") is None
