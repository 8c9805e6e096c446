"""ROPD: rubrics of groups, and what share of one a completion meets."""

from __future__ import annotations

import json
from itertools import product

import pytest

from opd_lightning.endpoint import BudgetSpent, Endpoint
from opd_lightning.endpoint_reward import Unreadable
from opd_lightning.methods.rubric import Criteria, Rubric
from opd_lightning.modalities.autoregressive import EndpointTexts, PromptView
from opd_lightning.objective import GroupRelative, Objective, PolicyGradient, Term
from opd_lightning.reward import ExactMatch
from opd_lightning.rollout_settings import Rollout
from tests.tiny import fit, make_module, make_rows, make_trainer, no_teacher

CRITERIA = [{"criterion": f"criterion {k}", "weight": k + 1} for k in range(4)]
QUICK = {"timeout": 5.0, "deadline": 5.0}
GRADE = PromptView(
    [{"role": "user", "content": "GRADE {{ written }}{% for c in rubric %} {{ c.criterion }}{% endfor %}"}]
)
WRITE = PromptView("RUBRIC {{ prompt }}|{{ teacher_texts | join(',') }}|{{ written | join(',') }}")


def read(body):
    return body["messages"][-1]["content"]


def scripted(body):
    """Teacher, author of rubrics and grader in one."""
    text = read(body)
    if text.startswith("RUBRIC"):
        return json.dumps({"criteria": CRITERIA})
    if text.startswith("GRADE"):
        written = text.removeprefix("GRADE ").partition(" criterion")[0]
        return json.dumps({"met": [(len(written) + k) % 2 == 0 for k in range(4)]})
    return f"the teacher on {text}"


def endpoint(server, folder):
    return Endpoint(server.url, keep=str(folder / "asked"), **QUICK)


@pytest.mark.parametrize("met", list(product([True, False], repeat=4))[::5])
def test_the_reward_is_the_share_of_weights_that_are_met(chatting, tmp_path, met):
    reward = Criteria(endpoint(chatting(lambda body: json.dumps({"met": met})), tmp_path), GRADE)
    row = {"prompt": "2+2=", "rubric": CRITERIA}
    weights = [one["weight"] for one in CRITERIA]
    expected = sum(w * v for w, v in zip(weights, met, strict=True)) / (sum(weights) + 1e-8)
    assert reward("4", row) == pytest.approx(expected, abs=1e-12)
    assert reward("4", row) < 1
    missed = [f"criterion {k}" for k, is_met in enumerate(met) if not is_met]
    assert reward.feedback("4", row) == ("\n".join(missed) or None)


@pytest.mark.parametrize("answer", ["[]", '{"met": [true]}', '{"met": [1, 1, 1, 1]}', '{"met": "all"}', "all are met"])
def test_a_grade_that_cannot_be_read_is_counted_and_no_zero(chatting, tmp_path, answer):
    reward = Criteria(endpoint(chatting(lambda body: answer), tmp_path), GRADE)
    assert reward("4", {"prompt": "2+2=", "rubric": CRITERIA}) is None
    assert reward.failures["unreadable"] == 1
    assert reward("4", {"prompt": "2+2=", "rubric": None}) is None, "there is nothing to grade by"
    assert reward.failures["unreadable"] == 1


def changed(**change):
    return {"criteria": [CRITERIA[0] | change, *CRITERIA[1:]]}


@pytest.mark.parametrize(
    "answer",
    [
        {"criteria": CRITERIA[:3]},
        {"criteria": CRITERIA * 4},
        {"criteria": "many"},
        {"rubric": CRITERIA},
        {"criteria": [*CRITERIA, "be right"]},
        changed(weight=0),
        changed(weight=11),
        changed(weight=True),
        changed(weight=1.5),
        changed(criterion=" "),
        changed(criterion="…"),
        changed(more=1),
    ],
)
def test_a_rubric_is_read_strictly(answer):
    with pytest.raises(Unreadable):
        Rubric(WRITE).read(json.dumps(answer))
    assert Rubric(WRITE).read(json.dumps({"criteria": CRITERIA})) == CRITERIA


@pytest.mark.parametrize("settings", [{"fewest": 0}, {"fewest": 5, "most": 4}, {"unreadable": "zero"}])
def test_what_cannot_be_meant_is_refused(settings):
    with pytest.raises(ValueError, match="Rubric: fewest="):
        Rubric(WRITE, **settings)
    with pytest.raises(ValueError, match="count is 0"):
        EndpointTexts(count=0)


def module_of(student, server, folder, objective=None, **settings):
    reward = Criteria(endpoint(server, folder), GRADE)
    notes = {"teacher_texts": EndpointTexts(count=2), "rubric": Rubric(WRITE, **settings)}
    objective = objective or Objective([Term(PolicyGradient(GroupRelative()), teacher=None)])
    return make_module(
        student, None, objective, reward=reward, notes=notes, rollout=Rollout(batch_size=2, group_size=4, horizon=6)
    )


def judged(module, folder):
    trainer = make_trainer(folder)
    module.trainer = trainer
    loader = module.rollout_loader(make_rows())
    return module.actor.judged(next(iter(loader.first_epoch()))[1])


def test_a_group_has_texts_of_the_teacher_and_one_rubric_and_each_rollout_its_grade(tiny_student, chatting, tmp_path):
    server = chatting(scripted)
    module = module_of(tiny_student, server, tmp_path)
    batch = judged(module, tmp_path)
    asked = [read(body) for body in server.bodies]
    prompts = {row["prompt"] for row in batch.examples}
    about_rubrics = [text for text in asked if text.startswith("RUBRIC")]
    assert len(prompts) == len(about_rubrics) == 2
    assert [asked.count(prompt) for prompt in prompts] == [2, 2], "two texts of each"
    texts = module.completions(batch)
    for text in about_rubrics:
        prompt, shown, written = text.removeprefix("RUBRIC ").split("|")
        assert shown == ",".join([f"the teacher on {prompt}"] * 2)
        own = [t for t, row in zip(texts, batch.examples, strict=True) if row["prompt"] == prompt]
        assert written == ",".join(own)
    assert {body.get("temperature") for body in server.bodies} == {0.0, 0.7, 1.0}
    parities = [[(len(text or " ") + k) % 2 == 0 for k in range(4)] for text in texts]
    assert batch.reward.tolist() == pytest.approx(
        [sum(one["weight"] for one, v in zip(CRITERIA, row, strict=True) if v) / (10 + 1e-8) for row in parities]
    )


def test_it_trains_and_counts_what_cannot_be_read(tiny_student, chatting, tmp_path):
    rubrics = iter(["no rubric", json.dumps({"criteria": CRITERIA})] * 10)

    def answer(body):
        return next(rubrics) if read(body).startswith("RUBRIC") else scripted(body)

    trainer = fit(module_of(tiny_student, chatting(answer), tmp_path), tmp_path)
    assert float(trainer.callback_metrics["train/rubric/unreadable"]) == 0.5
    assert float(trainer.callback_metrics["train/abstained"]) == 0.5
    module = module_of(tiny_student, chatting(lambda body: "no rubric"), tmp_path / "other", unreadable="stop")
    with pytest.raises(Unreadable, match=r"Rubric: http.* answered 'no rubric'"):
        judged(module, tmp_path)


def test_notes_end_with_the_budget(tiny_student, chatting, tmp_path):
    module = module_of(tiny_student, chatting(scripted), tmp_path)
    module.reward.endpoint.budget.tokens = 42 * 2
    with pytest.raises(BudgetSpent):
        fit(module, tmp_path)


def test_notes_without_an_endpoint_are_refused(tiny_student):
    for note in (EndpointTexts(), Rubric(WRITE)):
        with pytest.raises(ValueError, match=r"endpoint is not set, and model\.reward asks none"):
            make_module(tiny_student, None, no_teacher(), notes={"note": note}, reward=ExactMatch(), load=False)
