"""What an optimizer step takes: validation, and the evaluation before training, are no part of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from opd_lightning import diagnostics, gauges
from opd_lightning.gauges import Gauges
from opd_lightning.metrics import Metrics


def test_what_is_evaluated_counts_neither_for_a_step_nor_for_its_phases(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    for module in (gauges, diagnostics):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    metrics = Metrics()
    module = SimpleNamespace(metrics=metrics, total=float, unit="tokens")
    trainer, batch = SimpleNamespace(global_step=0, log_every_n_steps=1), SimpleNamespace(is_last=True)
    batch.step = SimpleNamespace(trajectories=[])
    gauge = Gauges()
    gauge.setup(trainer, module, "fit")
    gauge.on_train_start(trainer, module)
    with metrics.stopwatch.phase("teacher"):  # before training
        clock.now += 100
    gauge.on_train_epoch_start(trainer, module)
    with metrics.stopwatch.phase("rollout"):
        clock.now += 3
    gauge.on_validation_start(trainer, module)
    metrics.stopwatch.count("teacher", 9)
    with metrics.stopwatch.phase("teacher"):
        clock.now += 50
    gauge.on_validation_end(trainer, module)
    gauge.on_before_optimizer_step(trainer, module, None)
    clock.now += 1
    trainer.global_step = 1
    gauge.on_train_batch_end(trainer, module, None, batch, 0)
    assert metrics.gauges["time/step_s"] == pytest.approx(4)
    assert metrics.stopwatch.read() == {
        "time/rollout_share": pytest.approx(0.75),
        "time/update_share": pytest.approx(0.25),
    }
