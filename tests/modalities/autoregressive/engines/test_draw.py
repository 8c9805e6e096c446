"""`draw` against transformers' warpers and a float64 sum over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from opd_lightning.modalities.autoregressive.engines.draw import BLOCK, draw, uniforms
from opd_lightning.modalities.autoregressive.engines.generate import Sampler
from opd_lightning.rollout_settings import Rollout

SHAPES = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.05},
    {"top_p": 0.9},
    {"min_p": 0.2},
    {"temperature": 1.4, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
]
SIZES = [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 10 * BLOCK + 17]


def reference(logits: Tensor, rollout: Rollout) -> Tensor:
    """``[n, V]`` float64 probabilities after temperature and transformers' own warpers."""
    scores = logits.double() / rollout.temperature
    if rollout.top_k is not None:
        scores = TopKLogitsWarper(rollout.top_k)(None, scores)
    if rollout.top_p is not None and rollout.top_p < 1:
        scores = TopPLogitsWarper(rollout.top_p)(None, scores)
    if rollout.min_p is not None:
        scores = MinPLogitsWarper(rollout.min_p)(None, scores)
    return scores.softmax(1)


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_uniform_number_picks_the_reference_id(shape, size, spread):
    """Over a grid of uniform numbers the id is the one at which the reference's running sum passes each of them."""
    rollout, points = Rollout(**shape), 400
    logits = spread * torch.randn(1, size, generator=torch.Generator().manual_seed(size))
    uniform = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    ids, log_probs = draw(logits.expand(points, -1).clone(), uniform, rollout)
    running = reference(logits, rollout).cumsum(1)[0]
    low = torch.searchsorted(running, uniform - 2e-6, right=True)
    high = torch.searchsorted(running, uniform + 2e-6, right=True)
    assert ((low <= ids) & (ids <= high)).all()
    assert (reference(logits, rollout)[0, ids] > 0).all()
    assert torch.allclose(log_probs.double(), logits.double().log_softmax(1)[0, ids], atol=1e-5)


def test_greedy():
    logits = torch.randn(4, 300)
    ids, log_probs = draw(logits, torch.zeros(4, dtype=torch.float64), Rollout(temperature=0.0))
    assert torch.equal(ids, logits.argmax(1))
    assert torch.allclose(log_probs, logits.log_softmax(1).amax(1), atol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("impossible", [-torch.inf, -1e30])
def test_the_impossible_is_never_drawn(uniform, impossible):
    """Whole blocks of it at both ends, and between what is possible."""
    logits = torch.full((1, 6 * BLOCK), impossible)
    possible = torch.tensor([2 * BLOCK + 5, 2 * BLOCK + 9, 4 * BLOCK])
    logits[0, possible] = torch.tensor([0.3, -20.0, 1.0])
    for shape in SHAPES:
        ids, log_probs = draw(logits, torch.tensor([uniform], dtype=torch.float64), Rollout(**shape))
        assert int(ids) in possible
        assert log_probs.isfinite().all()


def test_a_row_draws_as_it_does_alone():
    logits, uniform = 2 * torch.randn(6, 1000), uniforms(list(range(6)), 1)[:, 0]
    for shape in SHAPES:
        together, _ = draw(logits, uniform, Rollout(**shape))
        alone = [draw(logits[i : i + 1], uniform[i : i + 1], Rollout(**shape))[0] for i in range(6)]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_draws_are_those_of_the_sampler_inside_generate(shape):
    head = type("Head", (), {"vocabulary": 700, "suppressed": None})()
    rollout, seeds = Rollout(horizon=1, **shape), list(range(200))
    logits = 2 * torch.randn(200, 700, generator=torch.Generator().manual_seed(1))
    sampler = Sampler(head, rollout, seeds)  # type: ignore[arg-type]
    theirs = sampler(None, logits.clone()).argmax(1)
    ids, log_probs = draw(logits, uniforms(seeds, 1)[:, 0], rollout)
    assert torch.equal(ids, theirs)
    assert torch.allclose(log_probs, sampler.log_probs[0], atol=1e-5)
