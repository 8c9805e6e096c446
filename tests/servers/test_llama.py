"""A chat endpoint that nobody here wrote: llama.cpp's server of SmolLM2, where `make servers` has installed it."""

from __future__ import annotations

import json

import pytest

from opd_lightning.endpoint import Endpoint
from opd_lightning.endpoint_reward import response_format
from opd_lightning.methods.rubric import Criteria, Rubric
from opd_lightning.modalities.autoregressive import Judge, PromptView, Remote
from opd_lightning.modalities.text.ask import main
from opd_lightning.objective import LogRatio, Objective, PolicyGradient, Term
from opd_lightning.pretrained import Pretrained
from opd_lightning.teacher import Teacher
from tests.tiny import make_module

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


def test_a_schema_makes_even_a_small_model_grade_in_the_form(endpoint):
    """What it says is worth little: 135 M parameters."""
    judge = Judge(endpoint, max_tokens=200, unreadable="stop")
    value = judge("Paris.", {"prompt": "What is the capital of France?", "answer": "Paris"})
    assert value in [grade / 10 for grade in range(11)]
    assert judge.failures["unreadable"] == 0


def test_a_rubric_is_written_and_graded_in_its_form(endpoint):
    form = response_format("Rubric", Rubric(PromptView("{{ prompt }}"), most=4).schema())
    asked = [
        {"role": "user", "content": "Write a rubric of 4 criteria, each with a weight, for answers to: What is 2 + 2?"}
    ]
    reply = endpoint.ask(asked, temperature=0.7, max_tokens=600, response_format=form).result()
    if reply.cut:
        pytest.skip("it did not come to an end")
    rubric = Rubric(PromptView("{{ prompt }}"), most=4).read(reply.text)
    view = PromptView("{{ written }}\n{% for one in rubric %}{{ loop.index }}. {{ one.criterion }}\n{% endfor %}")
    share = Criteria(endpoint, view, unreadable="stop")("4", {"prompt": "What is 2 + 2?", "rubric": rubric})
    assert 0 <= share < 1


def test_its_texts_become_rows(llama, tmp_path, capsys):
    data, into = tmp_path / "questions.jsonl", tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is {i} + {i}?"}) + "\n" for i in range(2)), encoding="utf-8")
    main(
        [
            f"--endpoint.url={llama.url}",
            f"--endpoint.keep={tmp_path}",
            f"--data={data}",
            f"--into={into}",
            "--max_tokens=300",
            "--temperature=0.2",
        ]
    )
    rows = [json.loads(line) for line in into.read_text(encoding="utf-8").splitlines()]
    assert rows
    assert all(row["prompt"].startswith("What is") and row["completion"] for row in rows)
    assert "of 2 texts" in capsys.readouterr().out


def test_without_a_schema_what_it_says_is_not_taken_for_a_grade(endpoint):
    judge = Judge(endpoint, max_tokens=60, structured=False)
    questions = [f"What is {i} + {i}?" for i in range(2)]
    rewards = [judge(str(2 * i), {"prompt": question}) for i, question in enumerate(questions)]
    assert judge.failures["unreadable"] == sum(reward is None for reward in rewards)
    print(json.dumps(rewards))


def test_it_is_no_teacher_with_log_probs_of_given_tokens(llama, smollm2_folder):
    """It answers 200, and leaves out what it was asked for."""
    teachers = {"teacher": Teacher(Remote(llama.url, timeout=60.0, deadline=120.0))}
    objective = Objective([Term(PolicyGradient(LogRatio()))])
    with pytest.raises(ValueError, match=r"model\.teachers\.teacher: .*answered without prompt_logprobs of") as caught:
        make_module(Pretrained(str(smollm2_folder), dtype="float32"), teachers, objective)
    print(str(caught.value)[:300])
