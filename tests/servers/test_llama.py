"""A chat endpoint that nobody here wrote: llama.cpp's server of SmolLM2, where `make servers` has installed it."""

from __future__ import annotations

import json

import pytest

from opd_lightning.endpoint import Endpoint
from opd_lightning.modalities.autoregressive import Judge
from tests.tiny import act, make_module, make_rows, no_teacher

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]


@pytest.fixture
def endpoint(llama, tmp_path):
    return Endpoint(llama.url, keep=str(tmp_path / "asked"), timeout=300.0, at_once=4)


def test_it_answers_and_counts(endpoint):
    asked = [{"role": "user", "content": "What is 2 + 2?"}]
    reply = endpoint.ask(asked, temperature=0.0, max_tokens=40).result()
    assert "4" in reply.text
    assert endpoint.spent()[0] == reply.read + reply.written > 10
    assert endpoint.ask(asked, temperature=0.0, max_tokens=40).result().text == reply.text
    cut = endpoint.ask([{"role": "user", "content": "Tell me a story."}], max_tokens=4).result()
    assert cut.cut
    assert cut.written == 4


def test_a_schema_makes_even_a_small_model_grade_in_the_form(endpoint, tiny_student):
    """What it says is worth little: 135 M parameters."""
    judge = Judge(endpoint, max_tokens=200, unreadable="stop")
    value = judge("Paris.", {"prompt": "What is the capital of France?", "answer": "Paris"})
    assert value in [grade / 10 for grade in range(11)]
    assert judge.failures["unreadable"] == 0
    module = make_module(tiny_student, None, no_teacher(), reward=judge)
    rewards, _ = module.rewards(act(module, make_rows(6)))
    assert all(reward is None or 0 <= reward <= 1 for reward in rewards)


def test_without_a_schema_what_it_says_is_not_taken_for_a_grade(endpoint):
    judge = Judge(endpoint, max_tokens=100, structured=False)
    questions = [f"What is {i} + {i}?" for i in range(4)]
    rewards = [judge(str(2 * i), {"prompt": question}) for i, question in enumerate(questions)]
    assert judge.failures["unreadable"] == sum(reward is None for reward in rewards)
    print(json.dumps(rewards))
