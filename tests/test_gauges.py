"""What an optimizer step takes: validation, and the evaluation before training, are no part of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from opd_lightning import diagnostics, gauges
from opd_lightning.diagnostics import Stopwatch
from opd_lightning.gauges import Gauges
from opd_lightning.heart import HEART
from opd_lightning.metrics import Metrics


def test_what_is_evaluated_counts_neither_for_a_step_nor_for_its_phases(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    for module in (gauges, diagnostics):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    metrics = Metrics()
    module = SimpleNamespace(metrics=metrics, total=float, unit="tokens", device=torch.device("cpu"))
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=1, precision="32-true")
    batch = SimpleNamespace(is_last=True)
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
    metrics.stopwatch.compute("teacher", 1e6)
    metrics.stopwatch.read_through(100, 50)
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


def test_what_threads_wait_for_does_not_hold_training_up():
    HEART.held_up.clear()
    with ThreadPoolExecutor(1) as threads:

        def ask() -> None:
            with HEART.waiting_for("server"):
                pass

        threads.submit(ask).result()
    assert not HEART.held_up
    with HEART.waiting_for("server"):
        pass
    assert {*Stopwatch().read()} == {"time/waited_server_share"}
    assert not HEART.held_up, "it begins anew"
