"""The time that a run will take: what is timed, and what is counted."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from opd_lightning import pace
from opd_lightning.check import main
from opd_lightning.pace import Pace
from opd_lightning.rollout_settings import Rollout


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Trained:
    """As much of a trainer and of a module as is timed."""

    accumulate_grad_batches, max_steps, callbacks, val_check_batch, num_val_batches = 2, 30, (), 15, [2]
    num_training_batches = 100
    rollout = Rollout(batch_size=4, group_size=2, micro_batch_size=2)  # 4 micro-batches, 2 updates a generation batch
    datamodule = type("Rows", (), {"validation": [{}] * 12, "validation_batch_size": 5})()

    class evaluator:
        scored_before = ("teacher",)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


def test_whole_generation_batches_are_timed_and_the_first_only_warms_up(clock):
    timed = Pace(Trained, Trained, before=False)
    assert timed.cycle == 2
    timed.begin()
    enough = []
    for seconds in (60.0, 50.0, 3.0, 1.0, 3.0, 1.0, 3.0):  # the first update after a rollout waits for it
        clock.now += seconds
        enough.append(timed.update())
    assert enough == [False, False, False, False, False, True, False]
    assert timed.per_update == pytest.approx(11 / 5)
    timed.seconds = timed.seconds[:2]
    assert timed.per_update == 55


def test_validations_are_counted_with_those_before_training(clock, monkeypatch):
    timed = Pace(Trained, Trained, before=True)
    assert timed.validations == 4  # of 60 micro-batches every 15
    monkeypatch.setattr(Pace, "_batch", lambda self, who, index: {"student": 3.0 - 2 * index, "teacher": 2.0}[who])
    timed.seconds = [9.0, 9.0, 2.0, 2.0]
    # a batch of five rows takes the student 1 s and 2 s more where it is the first; ten rows are two batches, four
    # times, and before training student and teacher act on all twelve
    assert timed.to_end() == (60.0, pytest.approx(5 * 2 + (4 * 10 + 12) / 5 * 1 + 12 / 5 * 2))
    assert timed.said() == "2 s an update, 60 s for 30 of them and 25 s for validations: 85 s in all"


@pytest.mark.slow
def test_a_run_says_what_its_validations_will_take(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pace, "TIMED", 0.0)
    monkeypatch.chdir(tmp_path)
    own = {"trainer": {"max_steps": 40, "val_check_interval": 20, "default_root_dir": "run"}}
    (tmp_path / "own.yaml").write_text(yaml.dump(own), encoding="utf-8")
    main(["-c", "opd:text/quickstart.yaml", "-c", "own.yaml", "--json", "--data.validation_options.count=8"])
    (time,) = (f for f in json.loads(capsys.readouterr().out)["findings"] if f["name"] == "time")
    assert re.search(
        r"s an update, .+ for 40 of them and .+ for validations: .+ in all; \d+% of an update", time["text"]
    )
