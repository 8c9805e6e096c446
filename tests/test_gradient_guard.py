"""The gradient before an optimizer step: of every trained parameter, and finite."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opd_lightning.gradient_guard import GradientGuard
from opd_lightning.metrics import Metrics


def guarded(gradients: list[float | None], on_nonfinite: Any) -> tuple[Metrics, torch.nn.Module]:
    """Calls the guard for a student with one parameter for each gradient."""
    student = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(1)) for _ in gradients)
    for parameter, gradient in zip(student, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.tensor([gradient])
    metrics, trainer = Metrics(), SimpleNamespace(global_step=6)
    streams: Any = SimpleNamespace(policies={"student": SimpleNamespace(model=student)})
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    GradientGuard(streams, on_nonfinite, metrics).on_before_optimizer_step(trainer, None, optimizer)  # type: ignore[arg-type]
    return metrics, student


def test_a_parameter_without_gradient_is_named():
    with pytest.raises(RuntimeError, match="1 trainable parameters got no gradient, among them 1;"):
        guarded([1.0, None], "stop")


def test_what_is_not_finite_stops_the_run_and_names_the_step():
    with pytest.raises(FloatingPointError, match="the gradient of optimizer step 7 is not finite"):
        guarded([1.0, float("inf")], "stop")


@pytest.mark.parametrize(("gradient", "skipped"), [(1.0, 0.0), (float("nan"), 1.0)])
def test_a_step_that_is_skipped_has_no_gradient_and_is_counted(gradient, skipped):
    metrics, student = guarded([1.0, gradient], "skip")
    recorded = metrics.averages.compute()
    assert (recorded["skipped_steps"], recorded["lr"]) == (skipped, 1.0)
    assert recorded.get("gradient_norm") == (None if skipped else pytest.approx(2**0.5))
    assert all((p.grad is None) == bool(skipped) for p in student.parameters())
