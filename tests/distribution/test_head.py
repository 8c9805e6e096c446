"""Every kind of head gives the dense gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from opd_lightning.adapters import only_adapters
from opd_lightning.distribution import Categorical, Head, categorical
from tests.distribution.dense import MASK, B, H, T, V, compare, expected_loss, seeded, states, teacher, train
from tests.objective.reference import close, linear


def adapted() -> nn.Module:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head"])
    return get_peft_model(Tiny(), config, autocast_adapter_dtype=False)


@pytest.fixture(params=["whole chunks", "pieces"])
def cut(request, monkeypatch):
    if request.param == "pieces":
        monkeypatch.setattr(categorical, "SMALL_PIECE", 0)
        monkeypatch.setattr(categorical, "PIECES", 3)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("chunk_steps", [1, 4, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 1.5)])
def test_a_linear_head_with_bias_scale_softcap_and_padding(scale, softcap, padding, bias, chunk_steps):
    layer, hidden = linear(V + padding, H, seeded(), bias=bias), states(1).requires_grad_()
    logits = F.linear(hidden, layer.weight, layer.bias)[..., :V] * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    against, log_q = teacher()
    student = Categorical(hidden, Head(layer, V, scale=scale, softcap=softcap))
    inputs = [hidden, *layer.parameters()]
    loss = train(student, against, chunk_steps)
    compare(loss, expected_loss(logits, log_q), inputs)
    gradient = torch.autograd.grad(train(student, against, chunk_steps), inputs)[1]
    assert (gradient[V:] == 0).all()


def test_suppressed_ids_have_no_probability_in_float16():
    torch.manual_seed(0)
    layer = nn.Linear(4, 9, bias=False).half()
    teacher = Categorical(torch.randn(6, 4).half(), Head(layer, 9, suppressed=torch.tensor([0, 7])))
    log_probs = teacher.at(torch.arange(6)).chunk(slice(0, 6)).log_probs()
    assert log_probs.dtype == torch.float32
    assert (log_probs[:, [0, 7]].exp() == 0).all()
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(6))


def test_suppressed_ids_have_no_probability_and_no_gradient():
    layer, hidden = linear(V, H, seeded()), states(1).requires_grad_()
    suppressed = torch.tensor([0, 7])
    against, _ = teacher()
    against = dataclasses.replace(against, head=dataclasses.replace(against.head, suppressed=suppressed))
    student = Categorical(hidden, Head(layer, V, suppressed=suppressed))
    index = torch.tensor(MASK).flatten().nonzero().squeeze(-1)
    assert (student.at(index).chunk(slice(0, 6)).log_probs()[:, suppressed].exp() == 0).all()
    gradients = torch.autograd.grad(train(student, against), [hidden, *layer.parameters()])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert (gradients[1][suppressed] == 0).all()
    assert (gradients[2][suppressed] == 0).all()


def test_a_head_tied_to_the_embedding_collects_both_gradients():
    embedding = nn.Embedding(V, H, dtype=torch.float64)
    head = nn.Linear(H, V, bias=False, dtype=torch.float64)
    head.weight = embedding.weight
    ids = torch.randint(V, (B, T), generator=seeded())
    against, log_q = teacher()
    loss = train(Categorical(torch.tanh(embedding(ids)), Head(head, V)), against)
    compare(loss, expected_loss(torch.tanh(embedding(ids)) @ embedding.weight.T, log_q), [embedding.weight])


def test_a_frozen_head_gets_no_gradient_and_none_is_computed():
    layer, hidden = linear(V, H, seeded()).requires_grad_(False), states(1).requires_grad_()
    against, log_q = teacher()
    student = Categorical(hidden, Head(layer, V))
    assert [x.shape for x in student.accumulator().inputs] == [hidden.shape]
    compare(train(student, against), expected_loss(F.linear(hidden, layer.weight, layer.bias), log_q), [hidden])
    assert layer.weight.grad is None


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_head_of_which_only_one_part_is_trained(trained):
    layer, hidden = linear(V + 2, H, seeded()).requires_grad_(False), states(1).requires_grad_()
    part = getattr(layer, trained).requires_grad_()
    against, log_q = teacher()
    loss = train(Categorical(hidden, Head(layer, V)), against)
    compare(loss, expected_loss(F.linear(hidden, layer.weight, layer.bias)[..., :V], log_q), [hidden, part])


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lm_head = linear(V + 2, H, seeded())

    def forward(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("chunk_steps", [1, 4, None])
def test_lora_on_the_head(chunk_steps):
    model = adapted()
    layer = model.base_model.model.lm_head
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        b.copy_(torch.randn(b.shape, generator=seeded(3)))
    assert a.dtype == torch.float64
    hidden = states(1).requires_grad_()
    weight = layer.base_layer.weight + 1.5 * b @ a
    against, log_q = teacher()
    loss = train(Categorical(hidden, Head(layer, V)), against, chunk_steps)
    logits = F.linear(hidden, weight, layer.base_layer.bias)[..., :V]
    compare(loss, expected_loss(logits, log_q), [hidden, a, b])
    assert layer.base_layer.weight.grad is None


def test_a_teacher_that_shares_the_students_head_switches_its_adapter_off():
    model = adapted()
    layer = model.base_model.model.lm_head
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    hidden = states(1)
    bare = Head(layer, V, context=lambda: only_adapters(model))
    close(bare(hidden), layer.base_layer(hidden)[..., :V], 1e-12)
    assert float((Head(layer, V)(hidden) - bare(hidden)).abs().max()) > 0.1


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("block", [3, 8192])
@pytest.mark.parametrize("kind", ["linear", "module"])
def test_under_autocast_the_projection_is_bf16_and_the_softmax_float32(kind, block, monkeypatch):
    monkeypatch.setattr(categorical, "BLOCK", block)
    layer = linear(V, H, seeded()).float()
    module: nn.Module = layer if kind == "linear" else nn.Sequential(layer)
    hidden = states(1, torch.float32).requires_grad_()
    against, log_q = teacher()
    against = Categorical(against.hidden.float(), dataclasses.replace(against.head, module=against.head.module.float()))
    student = Categorical(hidden, Head(module, V))
    with torch.autocast("cpu", torch.bfloat16):
        opened = student.at(torch.arange(8)).accumulator().open(slice(0, 8))
        assert opened.log_probs().dtype == torch.float32
        rounded = F.linear(hidden.flatten(0, 1).bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
        close(opened.log_probs(), rounded.float().log_softmax(-1), 1e-5)
        loss = train(student, against)
    inputs = [hidden, *layer.parameters()]
    assert [g.dtype for g in torch.autograd.grad(loss, inputs, retain_graph=False)] == [torch.float32] * 3
    with torch.autocast("cpu", torch.bfloat16):
        loss = train(student, against)
    expected = expected_loss(F.linear(hidden.double(), layer.weight.double(), layer.bias.double()), log_q)
    compare(loss, expected, inputs, 0.02)


@pytest.mark.parametrize("block", [3, 8192])
def test_bf16_weights_accumulate_in_float32_and_return_bf16(block, monkeypatch):
    monkeypatch.setattr(categorical, "BLOCK", block)
    layer, hidden = linear(V + 2, H, seeded()).bfloat16(), states(1, torch.bfloat16).requires_grad_()
    against, log_q = teacher()
    student = Categorical(hidden, Head(layer, V))
    accumulator = student.at(torch.arange(8)).accumulator()
    accumulator.close(accumulator.open(slice(0, 8)).log_probs()[:, 0].sum())
    assert {gradient.dtype for gradient in accumulator.gradients} == {torch.float32}
    inputs = [hidden, *layer.parameters()]
    loss = train(student, against)
    logits = F.linear(hidden.double(), layer.weight.double(), layer.bias.double())[..., :V]
    expected = expected_loss(logits, log_q)
    close(loss, expected, 0.02)
    for actual, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert actual.dtype == torch.bfloat16
        close(actual, wanted, 0.02)
