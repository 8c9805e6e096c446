"""Several policies in one set of weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from opd_lightning.adapters import AverageAdapter, average_product, only_adapters


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["first", "second"]} | changes)
    return get_peft_model(Two(), config)


def product(layer: nn.Module, name: str) -> torch.Tensor:
    return (layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]).detach().clone()


def walk(model: nn.Module, size: float = 0.3) -> None:
    """One step of a random walk of the student's adapter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "default" in name:
                parameter.add_(size * torch.randn_like(parameter))


@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
    rate=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_the_average_of_products_is_exact_where_the_rank_suffices(sizes, rate, seed):
    out, into, rank, new_rank = sizes
    torch.manual_seed(seed)
    factors = [torch.randn(*shape, dtype=torch.float64) for shape in ((out, rank), (rank, into))]
    new = [torch.randn(*shape, dtype=torch.float64) for shape in ((out, new_rank), (new_rank, into))]
    left, right = average_product(*factors, *new, rate, rank=rank + new_rank)
    assert left.shape == (out, rank + new_rank)
    assert right.shape == (rank + new_rank, into)
    wanted = (1 - rate) * factors[0] @ factors[1] + rate * new[0] @ new[1]
    assert torch.allclose(left @ right, wanted, atol=1e-10)


def test_the_average_of_products_is_the_best_of_its_rank():
    torch.manual_seed(0)
    a, b, c, d = torch.randn(8, 3), torch.randn(3, 7), torch.randn(8, 3), torch.randn(3, 7)
    wanted = 0.6 * a @ b + 0.4 * c @ d
    left, right = average_product(a, b, c, d, 0.4, rank=2)
    best = torch.linalg.matrix_norm(wanted, 2)
    singular = torch.linalg.svdvals(wanted)
    assert torch.allclose(torch.linalg.matrix_norm(wanted - left @ right), singular[2:].norm(), rtol=1e-4)
    assert singular[2:].norm() < best


def test_the_average_of_factors_would_be_another():
    """Why products are averaged: the mean of the factors has the wrong product."""
    torch.manual_seed(0)
    a, b, c, d = torch.randn(8, 2), torch.randn(2, 7), torch.randn(8, 2), torch.randn(2, 7)
    wanted = 0.5 * a @ b + 0.5 * c @ d
    naive = (0.5 * a + 0.5 * c) @ (0.5 * b + 0.5 * d)
    left, right = average_product(a, b, c, d, 0.5, rank=4)
    assert torch.linalg.matrix_norm(left @ right - wanted) < 1e-4
    assert torch.linalg.matrix_norm(naive - wanted) > 1


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_average_adapter_follows_the_average_of_the_products(rate):
    """Over 30 updates, within 3 % of the dense average, whose rank outgrows the adapter's."""
    model = adapted()
    average = AverageAdapter(model, "ema")
    layers = [model.base_model.model.first, model.base_model.model.second]
    dense = [torch.zeros_like(product(layer, "default")) for layer in layers]
    for _ in range(30):
        walk(model, 0.05)
        average.update(rate)
        dense = [(1 - rate) * old + rate * product(layer, "default") for old, layer in zip(dense, layers, strict=True)]
    for layer, wanted in zip(layers, dense, strict=True):
        error = torch.linalg.matrix_norm(product(layer, "ema") - wanted) / torch.linalg.matrix_norm(wanted)
        assert error < 0.03


def test_rates_zero_and_one():
    model = adapted()
    average = AverageAdapter(model, "ema")
    layer = model.base_model.model.first
    walk(model)
    average.update(0.0)
    assert torch.equal(product(layer, "ema"), torch.zeros(16, 12)), "a start where it does nothing, and no move"
    average.update(1.0)
    assert torch.allclose(product(layer, "ema"), product(layer, "default"), atol=1e-5)
    x = torch.randn(3, 12)
    with torch.no_grad(), only_adapters(model, "ema"):
        mine = model(x)
    assert torch.allclose(mine, model(x), atol=1e-5)


SCALINGS = [{"use_rslora": True}, {"lora_alpha": 1}, {"lora_dropout": 0.3}, {"rank_pattern": {"first": 3}}]


@pytest.mark.parametrize("changes", SCALINGS, ids=str)
def test_the_students_own_scaling_is_part_of_the_product(changes):
    model = adapted(**changes).eval()
    average = AverageAdapter(model, "ema")
    walk(model)
    average.update(1.0)
    x = torch.randn(3, 12)
    with torch.no_grad(), only_adapters(model, "ema"):
        mine = model(x)
    assert torch.allclose(mine, model(x), atol=1e-5)


def test_only_adapters_switches_and_leaves_gradients_alone():
    model = adapted()
    AverageAdapter(model, "ema").update(0.0)
    walk(model)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert [name for name, trained in before.items() if trained and "default" not in name] == []
    assert sum(before.values()) == 4
    x = torch.randn(3, 12)
    with_student = model(x)
    with only_adapters(model):
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
        with torch.no_grad():
            assert torch.equal(model(x), _bare(model, x))
        with only_adapters(model, "default"):
            assert torch.equal(model(x), with_student)
        with torch.no_grad():
            assert torch.equal(model(x), _bare(model, x))
    assert torch.equal(model(x), with_student)
    with pytest.raises(KeyError, match="trouble"), only_adapters(model):
        raise KeyError("trouble")
    assert torch.equal(model(x), with_student), "also after an exception"
    model(x).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if before[name])


def _bare(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    first, second = model.base_model.model.first.base_layer, model.base_model.model.second.base_layer
    return second(torch.tanh(first(x)))


def test_an_average_of_dora_is_refused():
    with pytest.raises(ValueError, match=r"model\.teachers\.ema: DoRA scales its products .* use LoRA, or"):
        AverageAdapter(adapted(use_dora=True), "ema")


def test_adapters_on_other_layers_are_refused():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    adapted_model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"]))
    with pytest.raises(ValueError, match="supports linear layers only, not Embedding"):
        AverageAdapter(adapted_model, "ema")
