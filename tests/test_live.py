"""What a pass keeps and needs is counted in bytes, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opd_lightning.live import taken

ROWS, WIDTH, OUT = 4, 8, 16
OUTPUT = 4 * ROWS * OUT


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, OUT), nn.ReLU()).eval()


def test_a_pass_that_trains_keeps_what_its_backward_pass_needs(model):
    row = torch.randn(ROWS, WIDTH)
    counted = taken(model, lambda: model(row), backward=True)
    assert counted.kept == OUTPUT, "ReLU remembers its own output, and nobody that of the matrix"
    assert counted.forward == 2 * OUTPUT
    gradients = 4 * (WIDTH * OUT + OUT)
    assert 2 * OUTPUT <= counted.backward <= 3 * OUTPUT + gradients
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.training


def test_a_pass_that_does_not_train_keeps_its_output_alone(model):
    row = torch.randn(ROWS, WIDTH)
    counted = taken(model, lambda: model(row), backward=False)
    assert counted == (OUTPUT, 2 * OUTPUT, OUTPUT)


def test_frozen_layers_keep_nothing(model):
    deep = nn.Sequential(model, nn.Linear(OUT, 1))
    model.requires_grad_(False)
    row = torch.randn(ROWS, WIDTH)
    frozen = taken(deep, lambda: deep(row), backward=True)
    model.requires_grad_(True)
    assert frozen.kept == OUTPUT + 4 * ROWS, "the input of the layer that is trained, and the output"
    assert frozen.backward < taken(deep, lambda: deep(row), backward=True).backward
