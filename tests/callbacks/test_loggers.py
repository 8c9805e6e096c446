"""Samples and metrics in the loggers that take both, with the packages themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

from opd_lightning.callbacks import CollapseAlarm, Curriculum, Linear, Samples
from opd_lightning.rollout_settings import Rollout
from tests.callbacks import toy

METRICS = ("train/loss/ReverseKL", "train/alarms", "knob/rollout.horizon", "knob/rollout.behavior.student")


def train(folder: Path, logger: Any) -> None:
    """Four optimizer steps, samples at two of them."""
    behavior = {"student": 0.5, "teacher": 0.5}
    module = toy.make_module(rollout=Rollout(batch_size=8, horizon=6, behavior=behavior))
    turned = {"rollout.horizon": Linear(3, 6, 4), "rollout.behavior.student": Linear(0.5, 1.0, 4)}
    callbacks = [Curriculum(turned), CollapseAlarm(), Samples(every=2, count=2, console=False)]
    toy.fit(module, folder, callbacks, logger=logger)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name=None)
    train(tmp_path, logger)
    written = EventAccumulator(logger.log_dir).Reload()
    for name in METRICS:
        assert [event.step for event in written.Scalars(name)] == [0, 1, 2, 3]
    texts = written.Tensors("rollouts/text_summary")
    assert [event.step for event in texts] == [0, 2]
    assert texts[0].tensor_proto.string_val[0].startswith(b"| prompt | completion |")


def test_mlflow(tmp_path):
    pytest.importorskip("mlflow")
    logger = MLFlowLogger(
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=(tmp_path / "artifacts").as_uri()
    )
    train(tmp_path, logger)
    for name in METRICS:
        assert len(logger.experiment.get_metric_history(logger.run_id, name)) == 4
    found = sorted((tmp_path / "artifacts").rglob("rollouts/step-*.md"))
    assert [file.name for file in found] == ["step-0.md", "step-2.md"]
    assert found[0].read_text(encoding="utf-8").startswith("| prompt | completion |")


def test_weights_and_biases(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    train(tmp_path, logger)
    summary = logger.experiment.summary
    assert summary["trainer/global_step"] == 3
    assert set(METRICS) <= set(summary.keys())
    assert summary["knob/rollout.horizon"] == 5
    files = Path(logger.experiment.dir)
    wandb.finish()
    tables = [json.loads(file.read_text(encoding="utf-8")) for file in files.rglob("rollouts_*.table.json")]
    assert len(tables) == 2
    assert tables[0]["columns"] == ["prompt", "completion", "reward", "length", "signal"]
    assert len(tables[0]["data"]) == 2
