"""The average of the student: what it is, who measures it, and that training does not notice."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch

from opd_lightning.callbacks import EarlyStopRollout, FirstSteps, WeightAverage
from tests.callbacks import toy


class Notes(L.Callback):
    """The student's weights after every optimizer step, and while it is validated."""

    def __init__(self) -> None:
        self.trained: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.trained.append(weights(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, *_) -> None:
        self.validated.append(weights(pl_module))


def weights(module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten().double() for weight in module.student.parameters()])


def run(folder: Path, *callbacks: L.Callback, **settings):
    notes, module = Notes(), toy.make_module()
    module.configure_model()
    first = weights(module)
    toy.fit(module, folder, [*callbacks, notes], steps=4, **settings)
    return first, notes, module


def test_validation_measures_the_average_and_training_does_not_notice(tmp_path):
    held_out = toy.make_rows(4)
    _, plain, _ = run(tmp_path / "plain", validation=held_out)
    first, notes, module = run(tmp_path / "averaged", WeightAverage(0.25), validation=held_out)
    assert all(torch.equal(a, b) for a, b in zip(plain.trained, notes.trained, strict=True))
    average, expected = first, []
    for trained in notes.trained:
        average = 0.75 * average + 0.25 * trained
        expected.append(average)
    for found, wanted in zip(notes.validated[-4:], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert torch.equal(weights(module), notes.trained[-1])


def test_a_checkpoint_holds_both_and_is_evaluated_as_the_average(tmp_path):
    callback = WeightAverage(0.5)
    _, _, module = run(tmp_path, callback)
    path = next(tmp_path.rglob("step-4.ckpt"))
    checkpoint = torch.load(path, weights_only=True)
    name, weight = next(iter(module.student.named_parameters()))
    assert torch.equal(checkpoint["state_dict"][f"student.{name}"], weight)
    assert torch.equal(checkpoint["averaged"][f"student.{name}"], callback.average[name])
    again = toy.make_module()
    again.configure_model()
    again.on_load_checkpoint(checkpoint)
    assert torch.equal(checkpoint["state_dict"][f"student.{name}"], callback.average[name])


def test_it_composes_and_resumes(tmp_path):
    toy.assert_resumes(
        lambda: (toy.make_module(), [EarlyStopRollout(FirstSteps(3)), WeightAverage(0.25)]), tmp_path, steps=4
    )


@pytest.mark.parametrize("rate", [0.0, -1.0, 1.5])
def test_a_rate_that_is_no_share_is_refused(rate):
    with pytest.raises(ValueError, match=r"WeightAverage\.rate is the student's share per optimizer step"):
        WeightAverage(rate)


def test_a_run_may_begin_to_average_when_it_is_resumed(tmp_path):
    toy.fit(toy.make_module(), tmp_path / "before", steps=2)
    callback, module = WeightAverage(1.0), toy.make_module()
    toy.fit(module, tmp_path / "after", [callback], steps=4, checkpoint=tmp_path / "before" / "step-2.ckpt")
    for name, weight in module.student.named_parameters():
        assert torch.equal(callback.average[name], weight)
