"""How the weights move, on matrices that are known."""

from __future__ import annotations

import math

import pytest
import torch

from opd_lightning.methods.geometry import ProjectGradient, UpdateGeometry, projected, stable_rank
from tests.callbacks import toy


def test_the_stable_rank_counts_directions():
    one = torch.outer(torch.arange(1.0, 4.0), torch.arange(1.0, 6.0))
    assert math.isclose(stable_rank(one), 1, abs_tol=1e-5)
    assert math.isclose(stable_rank(torch.eye(5)), 5, abs_tol=1e-5)
    assert math.isclose(stable_rank(torch.diag(torch.tensor([2.0, 1.0]))), 5 / 4, abs_tol=1e-5)


def test_what_moved_is_compared_with_the_start(tmp_path):
    geometry, logged = UpdateGeometry(every=2), {}
    module = toy.make_module()
    module.record = lambda name, values, counts=None: logged.setdefault(name, []).append(values)
    toy.fit(module, tmp_path, [geometry], 4)
    assert len(logged["geometry/unchanged"]) == 2 * 2, "two looks at two matrices"
    last = dict(module.student.named_parameters())
    for (name, start), rank, same in zip(
        geometry.first.items(), logged["geometry/stable_rank"][2:], logged["geometry/unchanged"][2:], strict=True
    ):
        moved = last[name].detach() - start
        values = torch.linalg.svdvals(moved.double())
        assert math.isclose(rank, float((values**2).sum() / values.max() ** 2), rel_tol=1e-4)
        assert torch.equal(same, (moved.abs() <= 1e-3 * start.abs()).double())


def test_it_resumes_and_refuses_impossible_numbers(tmp_path):
    toy.assert_resumes(lambda: (toy.make_module(), [UpdateGeometry(every=1)]), tmp_path, steps=3)
    with pytest.raises(ValueError, match="every=0 must be >= 1"):
        UpdateGeometry(every=0)


def test_projecting_twice_is_projecting_once():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(6, 2, generator=generator, dtype=torch.float64)).Q
    gradient = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    once = projected(gradient, directions)
    torch.testing.assert_close(projected(once, directions), once)
    assert int(torch.linalg.matrix_rank(once)) == 2
    torch.testing.assert_close(projected(gradient, torch.eye(6).double()), gradient)


class Weights(toy.L.Callback):
    """The student's matrices after every optimizer step."""

    def __init__(self) -> None:
        self.after = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append({n: w.detach().clone() for n, w in pl_module.student.named_parameters() if w.dim() == 2})


def test_from_the_start_on_matrices_move_in_their_directions_alone(tmp_path):
    def make():
        return toy.make_module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))

    project, weights, free = ProjectGradient(start=2, rank=1), Weights(), Weights()
    toy.fit(make(), tmp_path / "projected", [project, weights], 5)
    toy.fit(make(), tmp_path / "free", [free], 5)
    for name in weights.after[0]:
        assert torch.equal(weights.after[1][name], free.after[1][name]), "until then nothing is changed"
        later = weights.after[4][name] - weights.after[1][name]
        direction = project.directions[name][:, 0]
        along = torch.outer(later @ direction, direction)
        torch.testing.assert_close(later, along, atol=1e-6, rtol=1e-4)
        assert not torch.equal(weights.after[4][name], free.after[4][name])


def test_a_projected_run_resumes_and_refuses_impossible_numbers(tmp_path):
    toy.assert_resumes(lambda: (toy.make_module(), [ProjectGradient(start=2, rank=1)]), tmp_path, steps=4)
    with pytest.raises(ValueError, match="start=0 and rank=16 must be >= 1"):
        ProjectGradient(start=0)
