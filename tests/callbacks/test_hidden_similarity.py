"""Linear CKA by its definition over kernels, what it does not see, and a run that logs it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd_lightning.callbacks import HiddenSimilarity
from opd_lightning.callbacks.hidden_similarity import Moments
from opd_lightning.teacher import Initial, Teacher
from tests.tiny import fit


def states(seed: int, count: int = 40, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 2


def cka(one: Tensor, other: Tensor, pieces: int = 3) -> float:
    moments = Moments()
    for pair in zip(one.chunk(pieces), other.chunk(pieces), strict=True):
        moments.add(*pair)
    return moments.cka()


def test_it_is_the_alignment_of_centered_kernels():
    x, y = states(0), states(1, width=4) + states(0)[:, :4]
    center = torch.eye(40, dtype=torch.float64) - 1 / 40
    k, other = (center @ (z @ z.T) @ center for z in (x, y))
    assert cka(x, y) == pytest.approx(float((k * other).sum() / (k.norm() * other.norm())), abs=1e-10)
    assert 0 < cka(x, y) < 1


def test_rotations_scalings_and_shifts_are_not_seen():
    x = states(0)
    rotation, _ = torch.linalg.qr(states(2, 6))
    assert cka(x, x) == pytest.approx(1.0)
    assert cka(x, 0.3 * x @ rotation + 5) == pytest.approx(1.0)
    assert cka(x, torch.ones(40, 3).double()) == pytest.approx(0.0)


def test_a_student_that_is_its_teacher_has_1_and_moves_away(make_world, tmp_path):
    world = make_world("text")
    module = world.module({"teacher": Teacher(Initial())})
    similarity = HiddenSimilarity({1: 1, -1: -1})
    first = fit(module, tmp_path, callbacks=[similarity]).logged_metrics
    assert float(first["train/cka/layer_1"]) == pytest.approx(1.0, abs=1e-5)
    assert float(first["train/cka/layer_-1"]) == pytest.approx(1.0, abs=1e-5)
    other = world.module()
    apart = fit(other, tmp_path, callbacks=[HiddenSimilarity({1: 2})]).logged_metrics
    assert 0 < float(apart["train/cka/layer_1"]) < 0.99


def test_refusals(make_world, tmp_path):
    with pytest.raises(ValueError, match="names none"):
        HiddenSimilarity({})
    module = make_world("diffusion").alone()
    with pytest.raises(ValueError, match="hidden states, which this setting does not show"):
        HiddenSimilarity().check(module)
