"""Loss spikes: the rows of a step whose loss jumps are written down, worst first; a calm run writes nothing."""

from __future__ import annotations

import json

import lightning as L
import pytest

from opd_lightning.callbacks import LossSpikes
from opd_lightning.objective import Objective, ReverseKL, Term
from tests.callbacks import toy

SPIKE = 8


class Jumps(ReverseKL):
    """As much larger as `factor` says."""

    factor = 1.0

    def __call__(self, steps):
        return Jumps.factor * super().__call__(steps)


class Jolt(L.Callback):
    """Makes the loss of one optimizer step larger, until the next one begins."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        Jumps.factor = 50.0 if trainer.global_step + 1 == SPIKE else 1.0


def run(folder, spikes: LossSpikes, steps: int = 12, **settings):
    module = toy.make_module(objective=Objective([Term(Jumps())]))
    toy.fit(module, folder, [spikes, Jolt()], steps, **settings)
    path = folder / "spikes.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def test_the_rows_of_a_spike_are_written_with_what_each_contributes(tmp_path):
    with pytest.warns(
        UserWarning, match=rf"optimizer step {SPIKE}: the loss is .* in the median of the 7 steps before"
    ):
        rows = run(tmp_path, LossSpikes(factor=5.0, window=10, warmup=4, count=8))
    assert {row["step"] for row in rows} == {SPIKE}
    assert len(rows) == 8
    assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
    # all rows of the step are there, and the weights moved by one small step since
    assert sum(row["share"] for row in rows) == pytest.approx(rows[0]["loss"], rel=0.2)
    assert rows[0]["loss"] > 5 * rows[0]["median"]
    assert {"prompt", "completion", "length", "source", "row"} <= rows[0].keys()


@pytest.mark.parametrize("settings", [{"factor": 100.0}, {"warmup": 8, "window": 8}])
def test_nothing_is_written_below_the_factor_or_in_the_first_steps(settings, tmp_path):
    assert run(tmp_path, LossSpikes(**{"factor": 5.0, "window": 10, "warmup": 4, **settings}), steps=SPIKE) == []


def test_a_resumed_run_judges_by_the_same_steps(tmp_path):
    toy.assert_resumes(lambda: (toy.make_module(), [LossSpikes(warmup=2)]), tmp_path)


@pytest.mark.parametrize("settings", [{"factor": 1.0}, {"warmup": 0}, {"window": 5}, {"count": 0}])
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="LossSpikes: "):
        LossSpikes(**settings)
