"""How the weights move, on matrices that are known."""

from __future__ import annotations

import math

import pytest
import torch

from opd_lightning.methods.geometry import UpdateGeometry, stable_rank
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
