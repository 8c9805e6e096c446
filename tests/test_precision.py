"""Half precision: what was sampled is trained as it was sampled."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.objective import LogRatio, Objective, PolicyGradient, Term


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_importance_ratios_start_at_one_in_every_precision(precision, tmp_path, world, monkeypatch):
    objective = Objective([Term(PolicyGradient(LogRatio()))])
    module = world.module(objective=objective)
    seen = []
    evaluate = objective.__class__.__call__

    def spy(self, student, teachers, trajectories, *args, **kwargs):
        log_probs = student.head(student.hidden.flatten(0, 1)).log_softmax(-1).detach()
        now = log_probs.gather(1, trajectories.actions.view(-1, 1)).view_as(trajectories.mask)
        seen.append((trajectories.behavior_log_probs.dtype, (now - trajectories.behavior_log_probs)[trajectories.mask]))
        return evaluate(self, student, teachers, trajectories, *args, **kwargs)

    monkeypatch.setattr(objective.__class__, "__call__", spy)
    world.fit(module, tmp_path, precision=precision)
    ((dtype, difference),) = seen
    assert dtype == torch.float32, "a precision plugin must not round stored log-probs"
    assert difference.abs().max() < (1e-4 if precision == "32-true" else 0.05)
    assert torch.isfinite(next(module.student.parameters())).all()
