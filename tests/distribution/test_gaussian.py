"""Independent normals; their divergences are tested in tests/objective."""

from __future__ import annotations

import torch

from opd_lightning.distribution import Gaussian
from tests.distribution.dense import B, H, T, states


def test_at_flattens_states():
    gaussian = Gaussian(states(0), torch.rand(B, T, 1, dtype=torch.float64))
    here = gaussian.at(torch.tensor([5]))
    assert torch.equal(here.mean, gaussian.mean[1, 1][None])
    assert torch.equal(here.scale, gaussian.scale[1, 1].expand(H)[None])
