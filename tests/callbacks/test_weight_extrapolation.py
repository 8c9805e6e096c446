"""Longer strides: which candidates are tried, which are kept, and that a rejected one leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

from opd_lightning.callbacks import Curriculum, EarlyStopRollout, FirstSteps, Linear, WeightExtrapolation
from opd_lightning.callbacks.weight_extrapolation import _copy
from opd_lightning.rollout_settings import Rollout
from tests.callbacks import toy
from tests.tiny import LongerIsBetter


class Notes(L.Callback):
    """The weights after every optimizer step; before and after a `WeightExtrapolation` that stands between two."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.weights.append(torch.cat([weight.flatten() for weight in _copy(pl_module).values()]))


def run(folder, opinion: Callable[[float], float], steps: int = 8, distances=(2.0, 4.0, 6.0, 8.0, 10.0)) -> Any:
    """Rewards are an opinion about how far, in units of Δ, the weights are from where training left them."""
    trained, kept, tried = Notes(), Notes(), []

    class Opinionated(toy.Moves):
        def rewards(self, trajectories):
            shown = super().rewards(trajectories)[1]
            far = 0.0
            if len(trained.weights) > len(kept.weights):  # between the two: candidates are being tried
                now = torch.cat([weight.flatten() for weight in _copy(self).values()])
                before = kept.weights[len(trained.weights) // 2 - 1] if kept.weights else first
                stride = trained.weights[-1] - before
                far = float((now - trained.weights[-1]).norm() / stride.norm())
                tried.append((len(trained.weights), round(far, 2)))
            return torch.full((len(trajectories),), opinion(far)), shown

    module = toy.make_module(setting=Opinionated, reward=LongerIsBetter())
    module.configure_model()
    first = torch.cat([weight.flatten() for weight in _copy(module).values()])
    far_out = WeightExtrapolation(distances, examples=5)
    trainer = toy.fit(module, folder, [trained, far_out, kept], steps=steps)
    return first, trained.weights, kept.weights, tried, trainer, module


def test_rejection_leaves_training_as_it_was_bit_for_bit(tmp_path):
    plain = toy.make_module(reward=LongerIsBetter())
    toy.fit(plain, tmp_path / "plain", steps=8)
    *_, tried, trainer, module = run(tmp_path / "tried", lambda far: -far)
    assert {step for step, _ in tried} == {1, 2, 4, 8}, "only at powers of two"
    assert max(far for _, far in tried) == 2, "the first failure ends it"
    assert trainer.callback_metrics["train/extrapolation/distance"] == 0
    for name, weight in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], weight)


def test_what_is_accepted_lies_on_the_line(tmp_path):
    first, trained, kept, _, trainer, _ = run(tmp_path, lambda far: far, steps=4)
    assert torch.allclose(kept[0], trained[0] + 10 * (trained[0] - first), atol=1e-6)
    assert torch.allclose(kept[1], trained[1] + 10 * (trained[1] - kept[0]), atol=1e-5)
    assert torch.equal(kept[2], trained[2]), "three is no power of two"
    assert torch.allclose(kept[3], trained[3] + 10 * (trained[3] - kept[1]), atol=1e-4)
    assert trainer.callback_metrics["train/extrapolation/distance"] == 10
    assert trainer.callback_metrics["train/extrapolation/reward"] == pytest.approx(10, rel=1e-3)


def test_the_last_that_is_no_worse_is_kept(tmp_path):
    first, trained, kept, tried, _, _ = run(tmp_path, lambda far: -abs(far - 4.5), steps=1)
    assert sorted({far for _, far in tried}) == [0, 2, 4, 6]
    assert torch.equal(kept[0], trained[0] + 4.0 * (trained[0] - first))
    *_, kept_all, _, _, _ = run(tmp_path / "even", lambda far: 0.0, steps=1, distances=(1.0, 2.0))
    assert torch.allclose(kept_all[0], trained[0] + 2.0 * (trained[0] - first), atol=1e-6), "no worse is good enough"


def test_it_composes_and_resumes(tmp_path):
    def make():
        module = toy.make_module(rollout=Rollout(batch_size=8, micro_batch_size=4, horizon=6), reward=LongerIsBetter())
        grows = Curriculum({"rollout.temperature": Linear(1, 0.5, 6)})
        return module, [WeightExtrapolation(examples=7), EarlyStopRollout(FirstSteps(5)), grows]

    toy.assert_resumes(make, tmp_path, steps=9)


def test_it_works_on_text(make_world, tmp_path):
    world = make_world("text")
    others = [EarlyStopRollout(FirstSteps(6)), Curriculum({"rollout.temperature": Linear(1, 0.5, 4)})]
    module = world.module(reward=LongerIsBetter())
    trainer = world.fit(module, tmp_path, steps=4, callbacks=[WeightExtrapolation(examples=6), *others])
    assert 0 <= trainer.callback_metrics["train/extrapolation/reward"] <= 1


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"chooses by reward: set model\.reward"):
        toy.fit(toy.make_module(), tmp_path, [WeightExtrapolation()])
    with pytest.raises(ValueError, match=r"distances must be positive and rise, got \[4, 2\]"):
        WeightExtrapolation([4, 2])
    with pytest.raises(ValueError, match=r"examples must be >= 1"):
        WeightExtrapolation(examples=0)
