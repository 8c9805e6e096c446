"""Heads and distributions: every kind of head gives the dense gradient, without ever holding the logits."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from opd_lightning import distribution
from opd_lightning.adapters import only_adapters
from opd_lightning.distribution import IMPOSSIBLE, Categorical, CategoricalChunk, Gaussian, Head, Lazy
from opd_lightning.objective import CrossEntropy, ForwardKL, Objective, ReverseKL, Term
from tests.objective.reference import batch, close, linear

B, T, H, V = 2, 4, 5, 11
MASK = [[1, 1, 1, 0], [1, 0, 1, 1]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def states(seed: int, dtype: torch.dtype = torch.float64, width: int = H) -> Tensor:
    return torch.randn(B, T, width, generator=seeded(seed), dtype=torch.float64).to(dtype)


def adapted() -> nn.Module:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head"])
    return get_peft_model(Tiny(), config, autocast_adapter_dtype=False)


def teacher() -> tuple[Categorical, Tensor]:
    """A teacher of another width and padding, and its dense float64 log-probs ``[N, V]``."""
    layer, hidden = linear(V + 3, H + 1, seeded(9)), states(8, width=H + 1)
    dense = F.linear(hidden, layer.weight, layer.bias)[torch.tensor(MASK).bool(), :V].log_softmax(-1).detach()
    return Categorical(hidden, Head(layer.requires_grad_(False), V)), dense


def train(student: Categorical, against: Categorical, chunk_steps: int | None = 2) -> Tensor:
    objective = Objective([Term(ReverseKL())], chunk_steps=chunk_steps)
    return objective(student, {"teacher": against}, batch(MASK, V))[0]


def expected_loss(logits: Tensor, log_q: Tensor) -> Tensor:
    """From dense logits ``[B, T, V]``."""
    log_p = logits[torch.tensor(MASK).bool()].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def compare(loss: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float = 1e-7) -> None:
    close(loss, expected, max(tolerance, 1e-6))
    for actual, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        close(actual, wanted, tolerance)


# -- heads ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["whole chunks", "pieces"])
def cut(request, monkeypatch):
    if request.param == "pieces":
        monkeypatch.setattr(distribution, "SMALL_PIECE", 0)
        monkeypatch.setattr(distribution, "PIECES", 3)


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
    assert [x.shape for x in student.accumulator().gradients] == [hidden.shape]
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
    monkeypatch.setattr(distribution, "BLOCK", block)
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
    monkeypatch.setattr(distribution, "BLOCK", block)
    layer, hidden = linear(V + 2, H, seeded()).bfloat16(), states(1, torch.bfloat16).requires_grad_()
    against, log_q = teacher()
    student = Categorical(hidden, Head(layer, V))
    accumulator = student.at(torch.arange(8)).accumulator()
    assert {gradient.dtype for gradient in accumulator.gradients} == {torch.float32}
    inputs = [hidden, *layer.parameters()]
    loss = train(student, against)
    logits = F.linear(hidden.double(), layer.weight.double(), layer.bias.double())[..., :V]
    expected = expected_loss(logits, log_q)
    close(loss, expected, 0.02)
    for actual, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        assert actual.dtype == torch.bfloat16
        close(actual, wanted, 0.02)


# -- categorical ----------------------------------------------------------------------------------------------------


def test_log_prob_entropy_and_temperature_of_a_chunk():
    logits = torch.randn(6, V, generator=seeded(), dtype=torch.float64)
    action = torch.arange(6)
    exact = torch.distributions.Categorical(logits=logits)
    for warm in (False, True):
        chunk = CategoricalChunk(logits)
        if warm:
            chunk.log_probs()
        close(chunk.log_prob(action), exact.log_prob(action), 1e-12)
    close(chunk.entropy(), exact.entropy(), 1e-12)
    close(chunk.log_probs(0.5), (logits / 0.5).log_softmax(-1), 1e-12)


def test_log_probs_first_asked_for_without_gradient_still_have_one():
    logits = torch.randn(2, V, generator=seeded(), requires_grad=True)
    chunk = CategoricalChunk(logits)
    with torch.no_grad():
        assert not chunk.entropy().requires_grad
        assert not chunk.log_prob(torch.tensor([0, 1])).requires_grad
    assert chunk.log_probs().requires_grad
    assert not CategoricalChunk(logits.detach()).log_probs().requires_grad


def test_minus_infinity_becomes_an_impossible_id_with_finite_arithmetic():
    layer = linear(4, H, seeded()).float()
    with torch.no_grad():
        layer.bias[2] = -torch.inf
    student = Categorical(states(0, torch.float32).requires_grad_(), Head(layer, 4)).at(torch.arange(8))
    for chunk in (student.chunk(slice(0, 8)), student.accumulator().open(slice(0, 8))):
        assert (chunk.logits[:, 2] == IMPOSSIBLE).all()
        assert torch.isfinite(chunk.log_probs()).all()
        assert torch.isfinite(chunk.entropy()).all()
        close(chunk.log_probs().exp().sum(-1), torch.ones(8), 1e-6)


def test_at_flattens_states():
    student = Categorical(states(0), Head(linear(V, H, seeded()), V))
    assert torch.equal(student.at(torch.tensor([5])).hidden, student.hidden[1, 1][None])
    gaussian = Gaussian(states(0), torch.rand(B, T, 1, dtype=torch.float64))
    here = gaussian.at(torch.tensor([5]))
    assert torch.equal(here.mean, gaussian.mean[1, 1][None])
    assert torch.equal(here.scale, gaussian.scale[1, 1].expand(H)[None])


def test_cross_entropy_is_minus_the_log_prob_of_the_action():
    layer, hidden = linear(V, H, seeded()), states(1).requires_grad_()
    trajectories = batch(MASK, V)
    mask = trajectories.mask
    student, objective = Categorical(hidden, Head(layer, V)), Objective([Term(CrossEntropy(), None)], chunk_steps=2)
    loss, _ = objective(student, {}, trajectories)
    expected = F.cross_entropy(layer(hidden)[mask], trajectories.actions[mask])
    compare(loss, expected, [hidden, *layer.parameters()])


def test_padded_heads_of_151936_and_152064_rows_give_a_zero_at_equal_weights():
    """Rule 4, small: the same vocabulary under matrices of different height."""
    short, tall = linear(V + 1, H, seeded()), linear(V + 6, H, seeded(1))
    with torch.no_grad():
        tall.weight[:V], tall.bias[:V] = short.weight[:V], short.bias[:V]
    hidden = states(1).requires_grad_()
    against = Categorical(hidden.detach(), Head(tall.requires_grad_(False), V))
    for signal in (ForwardKL(), ReverseKL()):
        loss, _ = Objective([Term(signal)])(Categorical(hidden, Head(short, V)), {"teacher": against}, batch(MASK, V))
        assert abs(loss.item()) < 1e-12
        close(torch.autograd.grad(loss, hidden)[0], torch.zeros_like(hidden), 1e-12)


# -- lazy normals ---------------------------------------------------------------------------------------------------


class Field(nn.Module):
    """One forward pass per state; counts how many graphs are alive."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)
        self.idle = nn.Parameter(torch.zeros(1))
        nn.init.normal_(self.layer.weight, generator=seeded(seed))
        self.states = torch.randn(B * T, 3, generator=seeded(7), dtype=torch.float64)
        self.alive = self.peak = 0

    def forward(self, index: Tensor) -> Gaussian:
        mean = torch.tanh(self.layer(self.states[index]))
        if mean.requires_grad:
            self.alive += len(index)
            self.peak = max(self.peak, self.alive)
            weakref.finalize(mean, self._drop, len(index))
        return Gaussian(mean, torch.tensor(0.5, dtype=torch.float64))

    def _drop(self, states: int) -> None:
        self.alive -= states

    def lazy(self, trained: bool = True) -> Lazy:
        return Lazy(self, list(self.parameters()) if trained else [], size=1)


@pytest.mark.parametrize("chunk_steps", [1, 2, 6])
def test_lazy_normals_give_the_gradient_of_the_whole_and_hold_one_chunk(chunk_steps):
    student, other = Field(1), Field(2)
    trajectories = batch(MASK, 3)
    trajectories.actions = torch.zeros(B, T, 3, dtype=torch.float64)
    objective = Objective([Term(ReverseKL()), Term(ForwardKL(), coefficient=0.3)], chunk_steps=chunk_steps)
    loss, _ = objective(student.lazy(), {"teacher": other.lazy(trained=False)}, trajectories)
    assert student.peak == chunk_steps
    whole = Gaussian(student(torch.arange(B * T)).mean.view(B, T, 3), torch.tensor(0.5, dtype=torch.float64))
    said = Gaussian(other(torch.arange(B * T)).mean.detach().view(B, T, 3), torch.tensor(0.5, dtype=torch.float64))
    expected, _ = objective(whole, {"teacher": said}, trajectories)
    compare(loss, expected, list(student.layer.parameters()))


def test_a_parameter_that_no_lazy_chunk_depends_on_gets_no_gradient():
    student = Field(1)
    trajectories = batch(MASK, 3)
    loss, _ = Objective([Term(ReverseKL())])(student.lazy(), {"teacher": Field(2).lazy(trained=False)}, trajectories)
    loss.backward()
    assert student.idle.grad is None
    assert student.layer.weight.grad is not None
