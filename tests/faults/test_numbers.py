"""NaN, infinity, and too little memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from opd_lightning.objective import Objective, Term
from tests.callbacks import toy
from tests.faults.breaking import Breaks
from tests.tiny import fit, make_module


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_moves_anything(world, tmp_path):
    module = world.module(objective=Objective([Term(Breaks(3))]), optimizer=adam)
    seen = []
    module.on_train_batch_start = lambda *_: seen.append([p.detach().clone() for p in module.student.parameters()])
    with pytest.raises(FloatingPointError, match=r"the gradient of optimizer step 3 is not finite.*on_nonfinite: skip"):
        world.fit(module, tmp_path, steps=5)
    assert all(torch.equal(a, b) for a, b in zip(seen[-1], module.student.parameters(), strict=True))


def test_or_is_skipped_and_counted(world, tmp_path):
    """Neither the moments of the optimizer nor its weight decay move anything."""
    module = world.module(objective=Objective([Term(Breaks(3))]), optimizer=adam, on_nonfinite="skip")
    seen, skipped = [], []

    class Watching(type(module)):  # type: ignore[misc]
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            seen.append([p.detach().clone() for p in self.student.parameters()])
            skipped.append(float(self.trainer.callback_metrics["train/skipped_steps"]))

    module.__class__ = Watching
    trainer = world.fit(module, tmp_path, steps=5)
    assert trainer.global_step == 5
    assert skipped == [0, 0, 1, 0, 0]
    same = [all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in pairwise(seen)]
    assert same == [False, True, False, False]
    assert all(torch.isfinite(p).all() for p in module.student.parameters())


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 GB")],
)
def test_too_little_memory_for_the_objective_says_what_would_need_less(error, tiny_student, tiny_teacher, tmp_path):
    module = make_module(tiny_student, tiny_teacher)

    class Full(Objective):
        def __call__(self, *_, **__):
            raise error

    module.objective.__class__ = Full
    with pytest.raises(RuntimeError, match=r"out of memory in the objective, .* take 192 MiB.*chunk_mib first"):
        fit(module, tmp_path)


def test_a_skipped_step_is_counted_at_the_next_logged_one_also_of_a_run_resumed_between(tmp_path):
    def run(folder, done=0):
        objective = Objective([Term(Breaks(3 - done))])
        module = toy.make_module(objective=objective, optimizer=adam, on_nonfinite="skip")
        checkpoint = tmp_path / "whole" / f"step-{done}.ckpt" if done else None
        trainer = toy.fit(module, folder, steps=5, checkpoint=checkpoint, log_every_n_steps=5)
        return {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("train/")}

    unbroken = run(tmp_path / "whole")
    assert unbroken["train/skipped_steps"] == 1 / 4, "of the steps after the first, which is logged by itself"
    for done in (1, 2, 3, 4):
        assert run(tmp_path / f"from{done}", done) == pytest.approx(unbroken, nan_ok=True)
