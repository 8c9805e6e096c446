"""Scored: log-probs of the actions, and of the likeliest ids, against dense float64 distributions."""

from __future__ import annotations

import math

import pytest
import torch

from opd_lightning.distribution import CategoricalChunk, Scored
from opd_lightning.objective import JSD, ForwardKL, ReverseKL, Support
from opd_lightning.objective.steps import OpenSteps
from tests.objective.reference import batch

N, V = 12, 9


def made(k: int | None, seed: int = 0):
    """Dense logits of student and teacher, actions, and the teacher as one that tells k ids beside the action's."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(N, V, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    action = torch.randint(V, (N,), generator=generator)
    log_q = q.log_softmax(-1)
    top = (None, None) if k is None else reversed(log_q.topk(k))
    said = Scored(log_q.gather(-1, action[:, None]).squeeze(-1), action, V, *top)
    return p, log_q, action, said


def steps_of(p: torch.Tensor, action: torch.Tensor, said: Scored) -> OpenSteps:
    trajectories = batch([[1] * N], V)
    trajectories.actions = action[None]
    steps = OpenSteps(trajectories, torch.arange(N), student=CategoricalChunk(p))
    return steps.for_term("teacher", said.chunk(slice(0, N)))


def buckets(log_probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Probabilities of the ids, and of all others together, row by row."""
    rows = []
    for row, chosen in zip(log_probs.exp(), ids.tolist(), strict=True):
        rest = [v for v in range(V) if v not in chosen]
        rows.append(torch.stack([*(row[v] for v in chosen), sum(row[v] for v in rest)]))
    return torch.stack(rows)


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * (a.log() - b.log())).sum(-1)


@pytest.mark.parametrize(
    ("signal", "formula"),
    [
        (ReverseKL, lambda p, q: kl(p, q)),
        (ForwardKL, lambda p, q: kl(q, p)),
        (JSD, lambda p, q: 0.5 * kl(q, (p + q) / 2) + 0.5 * kl(p, (p + q) / 2)),
    ],
)
@pytest.mark.parametrize(("k", "told"), [(3, 3), (2, 4), (None, None), (None, 5)])
def test_a_divergence_on_what_is_told_is_that_of_the_buckets(signal, formula, k, told):
    p, log_q, action, said = made(told)
    p.requires_grad_()
    ids = action[:, None] if k is None else log_q.topk(k).indices
    support = Support("sampled") if k is None else Support("teacher", k)
    value = signal(support=support)(steps_of(p, action, said))
    value.sum().backward()
    leaf = p.detach().requires_grad_()
    expected = formula(buckets(leaf.log_softmax(-1), ids), buckets(log_q, ids))
    expected.sum().backward()
    assert torch.allclose(value, expected)
    assert torch.allclose(p.grad, leaf.grad)


def test_when_every_id_is_told_nothing_is_lost():
    p, log_q, action, said = made(V)
    whole = steps_of(p, action, said).for_term("teacher", CategoricalChunk(log_q))
    assert torch.allclose(ReverseKL(support=Support("teacher", V))(steps_of(p, action, said)), ReverseKL()(whole))


def test_ids_that_are_not_told_share_the_rest_and_none_is_told_twice():
    _, log_q, action, said = made(4)
    said.ids[3, 2:] = -1  # a server that told less of one state
    coarse = said.chunk(slice(0, N)).coarse()
    assert torch.allclose(coarse.exp().sum(-1), torch.ones(N, dtype=torch.float64))
    for row in range(N):
        known = {*said.ids[row].tolist(), int(action[row])} - {-1}
        assert all(torch.isclose(coarse[row, v], log_q[row, v]) for v in known)
        assert len({float(coarse[row, v]) for v in range(V) if v not in known}) == 1


def test_a_certain_teacher_leaves_what_rounding_may_have_hidden():
    said = Scored(torch.zeros(1), torch.tensor([2]), V)
    expected = torch.tensor([0.0 if v == 2 else math.log(2**-24 / (V - 1)) for v in range(V)])
    assert torch.allclose(said.chunk(slice(0, 1)).coarse()[0], expected)


@pytest.mark.parametrize("above", [-1e-6, 0.0, 1e-7, 9e-4])
@pytest.mark.parametrize("signal", [ReverseKL, ForwardKL, JSD])
def test_log_probs_that_add_up_to_one_or_a_little_more_teach_all_the_same(signal, above):
    """A server's float32 numbers of a sure teacher: 1 − Σ is rounding, and no reason for a loss of 1e30."""
    p, _, action, _ = made(None)
    p = p.float().requires_grad_()
    ids = torch.stack([action, (action + 1) % V], -1)
    top = torch.tensor([0.99, 0.01]).log().expand(N, 2) + above
    said = Scored(top[:, 0], action, V, ids, top)
    said.check(torch.ones(N, dtype=torch.bool), "the server")
    value = signal(support=Support("teacher", 2))(steps_of(p, action, said))
    value.sum().backward()
    assert value.abs().max() < 20
    assert p.grad.abs().max() < 20


def test_pieces_and_moves_keep_what_is_told():
    _, _, _, said = made(2)
    wide = Scored(*(t.unflatten(0, (3, 4)) for t in (said.log_probs, said.actions)), V,
                  said.ids.unflatten(0, (3, 4)), said.top.unflatten(0, (3, 4)))  # fmt: skip
    index = torch.tensor([5, 0, 11])
    assert wide.states == (3, 4)
    assert torch.equal(
        wide.to("cpu").at(index).chunk(slice(1, 3)).coarse(), said.at(index[1:]).chunk(slice(0, 2)).coarse()
    )


def test_what_nobody_knows_is_refused_in_words():
    p, _, action, said = made(2)
    for name in ("entropy", "confidence", "known", "log_probs"):
        with pytest.raises(TypeError, match="`distribution` in its needs"):
            getattr(steps_of(p, action, said).teacher, name)()
    with pytest.raises(TypeError, match="`distribution` in its needs"):
        ReverseKL()(steps_of(p, action, said))


@pytest.mark.parametrize("value", [float("nan"), 0.1])
def test_what_is_missing_is_an_error_and_not_a_zero(value):
    _, _, _, said = made(2)
    said.log_probs[4] = value
    told = torch.ones(N, dtype=torch.bool)
    with pytest.raises(ValueError, match="the cache: 1 of 12 log-probs"):
        said.check(told, "the cache")
    told[4] = False
    said.check(told, "the cache")


def test_probabilities_that_add_up_to_more_than_one_are_refused():
    _, _, _, said = made(2)
    said.top[1] = torch.tensor(0.9).log()
    with pytest.raises(ValueError, match="add up to more than 1"):
        said.check(torch.ones(N, dtype=torch.bool), "the server")
