"""Signals on hidden states against dense float64 references; their memory, and heads that are not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from opd_lightning.distribution import Categorical, Head, Stream, categorical
from opd_lightning.objective import Entropy, HiddenMatch, LogLinear, Objective, ReverseKL, Term, Window
from tests.objective.reference import batch, close, linear

MASK = [[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
B, T, V = len(MASK), len(MASK[0]), 7
KINDS = ("plain", "scaled", "module")


def states(seed: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def policy(seed: int, width: int, numbers: list[int], kind: str = "plain", trained: bool = True) -> Categorical:
    layer: nn.Module = linear(V, width, torch.Generator().manual_seed(seed))
    layer = nn.Sequential(layer) if kind == "module" else layer
    head = Head(layer.requires_grad_(trained), V, scale=0.5 if kind == "scaled" else 1.0)
    layers = {n: states(seed + 10 * (n + 5), width).requires_grad_(trained) for n in numbers}
    return Categorical(states(seed, width).requires_grad_(trained), head, layers)


def loss_of(
    student: Categorical, teacher: Categorical, *terms: Term, chunk_steps: int | None = 3, **changes: Any
) -> Tensor:
    objective = Objective(list(terms), chunk_steps=chunk_steps)
    return objective(student, {"teacher": Stream(teacher)}, batch(MASK, V), **changes)[0]


def dense(
    student: Categorical, teacher: Categorical, pairs: dict[int, int], weights: dict[int, Tensor] | None = None
) -> Tensor:
    """``[B, T]`` by a loop over layers and steps."""
    total = torch.zeros(B, T, dtype=torch.float64)
    for own, other in pairs.items():
        for b in range(B):
            for t in range(T):
                h = student.layers[own][b, t]
                h = h if weights is None else weights[own] @ h
                total[b, t] = total[b, t] + sum((h - teacher.layers[other][b, t].detach()) ** 2) / len(h)
    return total / len(pairs)


def inputs(student: Categorical) -> list[Tensor]:
    return [student.hidden, *student.layers.values(), *student.head.module.parameters()]


def same(actual: Tensor, expected: Tensor, of: list[Tensor]) -> None:
    close(actual, expected, 1e-6)
    found = torch.autograd.grad(actual, of, allow_unused=True)
    wanted = torch.autograd.grad(expected, of, allow_unused=True)
    for gradient, reference in zip(found, wanted, strict=True):
        assert (gradient is None) == (reference is None)
        if gradient is not None and reference is not None:
            close(gradient, reference, 1e-7)


@pytest.mark.parametrize("chunk_steps", [1, 3, None])
@pytest.mark.parametrize(
    ("layers", "pairs"), [("all", {1: 1, 2: 2}), ({-1: -1}, {-1: -1}), ({1: 2, 2: 4}, {1: 2, 2: 4})]
)
def test_it_is_the_squared_error_layer_by_layer(layers, pairs, chunk_steps):
    student, teacher = policy(0, 5, [*pairs]), policy(1, 5, [*pairs.values()], trained=False)
    loss = loss_of(student, teacher, Term(HiddenMatch(layers)), chunk_steps=chunk_steps)
    mask = torch.tensor(MASK).bool()
    same(loss, dense(student, teacher, pairs)[mask].mean(), inputs(student))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [False, True])
def test_beside_a_divergence_both_gradients_are_there(kind, cut, monkeypatch):
    """One read of the logits or none, whole chunks or pieces: OPD + μ·OPRD."""
    if cut:
        monkeypatch.setattr(categorical, "SMALL_PIECE", 0)
        monkeypatch.setattr(categorical, "PIECES", 2)
    student, teacher = policy(0, 5, [1, 2], kind), policy(1, 5, [1, 2], kind, trained=False)
    loss = loss_of(student, teacher, Term(ReverseKL()), Term(HiddenMatch(), coefficient=10.0))
    mask = torch.tensor(MASK).bool()

    def log_probs(policy: Categorical) -> Tensor:
        return (policy.head.module(policy.hidden) * policy.head.scale).log_softmax(-1)[mask]

    p, q = log_probs(student), log_probs(teacher).detach()
    expected = (p.exp() * (p - q)).sum(-1).mean() + 10 * dense(student, teacher, {1: 1, 2: 2})[mask].mean()
    same(loss, expected, inputs(student))


def test_a_projection_of_each_layer_is_trained():
    student, teacher = policy(0, 3, [1, 2]), policy(1, 5, [2, 4], trained=False)
    signal = HiddenMatch({1: 2, 2: 4}, (3, 5)).double()
    projections = {1: signal.projections["layer_1"].weight, 2: signal.projections["layer_2"].weight}
    loss = loss_of(student, teacher, Term(signal))
    expected = dense(student, teacher, {1: 2, 2: 4}, projections)[torch.tensor(MASK).bool()].mean()
    same(loss, expected, [*student.layers.values(), *projections.values()])
    assert Objective([Term(signal)]).modules().state_dict().keys() == {
        f"HiddenMatch_HiddenMatch.projections.layer_{n}.weight" for n in (1, 2)
    }


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient():
    student = policy(0, 5, [1, 2])
    teacher = Categorical(student.hidden.detach(), student.head, {n: h.detach() for n, h in student.layers.items()})
    loss = loss_of(student, teacher, Term(HiddenMatch()))
    assert loss == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, [*student.layers.values()]))


def test_the_last_steps_alone_say_the_same_where_errors_are_constant():
    student = policy(0, 5, [1])
    teacher = Categorical(student.hidden.detach(), student.head, {1: student.layers[1].detach() + 0.3})
    for last in (1, 2, 5):
        term = Term(HiddenMatch(), weights=[Window(last=last)], normalizer="weights")
        assert loss_of(student, teacher, term).item() == pytest.approx(0.09)


def test_neither_head_is_computed_where_nothing_reads_logits():
    class Refusing(nn.Linear):
        def __getattr__(self, name: str) -> Any:
            if name in ("weight", "bias"):
                raise AssertionError("a head was read")
            return super().__getattr__(name)

    student, teacher = policy(0, 5, [1, 2]), policy(1, 5, [1, 2], trained=False)
    for side in (student, teacher):
        side.head.module.requires_grad_(False)
        side.head.module.__class__ = Refusing
        object.__setattr__(side.head, "trainable", list)
    loss_of(student, teacher, Term(HiddenMatch()), diagnose=False).backward()
    with pytest.raises(AssertionError, match="a head was read"):
        loss_of(student, teacher, Term(HiddenMatch(), weights=[Entropy("student")]))


class Counted(TorchDispatchMode):
    """Elements of all tensors that are made, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in [made] if isinstance(made, Tensor) else []:
            if not func.is_view:
                self.total, self.largest = self.total + tensor.numel(), max(self.largest, tensor.numel())
        return made


def counted(vocabulary: int, layers: int, width: int, steps: int) -> Counted:
    mask = torch.ones(2, steps // 2, dtype=torch.bool)
    head = Head(nn.Linear(width, vocabulary, bias=False).requires_grad_(False), vocabulary)

    def side(trained: bool) -> Categorical:
        hidden = {n: torch.randn(2, steps // 2, width, requires_grad=trained) for n in range(1, layers + 1)}
        return Categorical(torch.randn(2, steps // 2, width, requires_grad=trained), head, hidden)

    student, teacher, trajectories = side(True), side(False), batch(mask.int().tolist(), 2)
    objective = Objective([Term(HiddenMatch())], chunk_steps=steps)
    with Counted() as count:
        objective(student, {"teacher": Stream(teacher)}, trajectories).loss.backward()
    return count


def test_memory_grows_with_layers_steps_and_width_and_not_with_the_vocabulary():
    small, other = counted(50, 4, 32, 64), counted(200_000, 4, 32, 64)
    # pieces are cut by the size of the vocabulary, nothing else knows it: no tensor is as long as it
    assert other.total == pytest.approx(small.total, rel=0.01)
    assert other.largest == small.largest == 64 * 32
    for changed in (counted(50, 8, 32, 64), counted(50, 4, 64, 64), counted(50, 4, 32, 128)):
        assert changed.total == pytest.approx(2 * small.total, rel=0.1)


def test_refusals():
    with pytest.raises(ValueError, match="names none"):
        HiddenMatch({})
    with pytest.raises(ValueError, match=r"signal.widths=\(3, 5\): each layer has a projection"):
        HiddenMatch("all", (3, 5))
    target = Term(HiddenMatch(), target=LogLinear({"teacher": 1.0}))
    with pytest.raises(ValueError, match="reads hidden states; a target has none"):
        Objective([target]).check({"teacher"})
    with pytest.raises(ValueError, match="HiddenMatch needs 'layers': only settings whose policies show"):
        Objective([Term(HiddenMatch())]).check({"teacher"}, {"categorical"}, {"student"})


def test_layers_of_a_policy():
    terms = [
        Term(HiddenMatch({1: 3, -1: -1})),
        Term(HiddenMatch(), teacher="other"),
        Term(ReverseKL(), teacher="third"),
    ]
    objective = Objective(terms)
    assert objective.layers("student", 2) == [-1, 1, 2]
    assert objective.layers("teacher", 9) == [-1, 3]
    assert objective.layers("other", 2) == [1, 2]
    assert objective.layers("third", 2) == []
    terms[1].coefficient = 0.0
    assert objective.layers("other", 2) == []
