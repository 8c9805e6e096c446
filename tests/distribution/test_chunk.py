"""What is derived from the logits of one piece."""

from __future__ import annotations

import torch

from opd_lightning.distribution import CategoricalChunk
from tests.distribution.dense import V, seeded
from tests.objective.reference import close


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
