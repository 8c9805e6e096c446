"""Hidden states and a head, without ever holding the logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from opd_lightning.distribution import IMPOSSIBLE, Categorical, Head, Stream
from opd_lightning.objective import CrossEntropy, ForwardKL, Objective, ReverseKL, Term
from tests.distribution.dense import MASK, H, V, compare, seeded, states
from tests.objective.reference import batch, close, linear


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
    against = Stream(Categorical(hidden.detach(), Head(tall.requires_grad_(False), V)))
    for signal in (ForwardKL(), ReverseKL()):
        loss, _ = Objective([Term(signal)])(Categorical(hidden, Head(short, V)), {"teacher": against}, batch(MASK, V))
        assert abs(loss.item()) < 1e-12
        close(torch.autograd.grad(loss, hidden)[0], torch.zeros_like(hidden), 1e-12)
