"""Hidden states of layers: those of plain passes, what fits what, and runs that read nothing else."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.modalities.autoregressive.models import bare
from opd_lightning.objective import HiddenMatch, Objective, ReverseKL, Term
from opd_lightning.pretrained import Pretrained
from opd_lightning.teacher import Frozen, Initial, Teacher
from tests.tiny import act, fit, make_module, make_rows


def matching(layers="all", widths=None, **settings):
    return Objective([Term(HiddenMatch(layers, widths), **settings)])


@pytest.mark.parametrize("where", ["text", "llama", "gemma3", "vision_language"])
def test_they_are_those_of_a_plain_pass(where, make_world):
    """Row by row, without padding, and with a prompt that rows share."""
    world = make_world(where)
    module, rows = world.alone(), world.make_rows(3)
    acted = act(module, [rows[0], rows[0], rows[1], rows[2]])
    policy = module.policies["student"]
    layers = module.hidden_states(policy, acted, [0, 1, -1])
    if where == "vision_language":
        expected = module.distribution(policy, acted).hidden
        torch.testing.assert_close(layers[2], expected)
        return
    for i, row in enumerate(acted.examples):
        prompt = module.tokenizer()(row["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *acted.actions[i, acted.mask[i]].tolist()]])
        with torch.no_grad():
            plain = bare(module.student).eval().base_model(input_ids=ids, output_hidden_states=True).hidden_states
        for number, found in zip((0, 1, -1), layers, strict=True):
            steps = int(acted.mask[i].sum())
            wanted = plain[number][0, len(prompt) - 1 : len(prompt) - 1 + steps]
            torch.testing.assert_close(found[i, :steps], wanted, atol=1e-4, rtol=1e-4)


def test_only_what_a_term_reads_is_there(tiny_student):
    objective = Objective([Term(ReverseKL()), Term(HiddenMatch({1: 2}), coefficient=0.0)])
    module = make_module(tiny_student, {"teacher": Teacher(Initial())}, objective)
    acted = act(module, make_rows(2))
    assert module.distribution(module.policies["student"], acted).layers == {}
    objective.terms[1].coefficient = 1.0
    assert [*module.distribution(module.policies["student"], acted).layers] == [1]
    assert [*module.distribution(module.policies["teacher"], acted).layers] == [2]


def test_what_does_not_fit_is_refused_before_training(tiny_student, tiny_teacher, saved):
    def refusal(objective, teacher=tiny_teacher):
        with pytest.raises(ValueError, match=r"^objective\.terms\[0\]\.signal \(HiddenMatch\)") as caught:
            make_module(tiny_student, teacher, objective).audit_rows()
        return str(caught.value)

    assert "student are 32 wide, those of 'teacher' 48; widths: [32, 48] projects" in refusal(matching())
    assert "widths is (32, 40)" in refusal(matching({1: 1}, (32, 40)))
    assert "'teacher' has layers 1 to 2, not 3" in refusal(matching({1: 3}, (32, 48)))
    assert "the student has layers 1 to 2, not -4" in refusal(matching({-4: 1}, (32, 48)))
    deeper = saved(seed=2, num_hidden_layers=3)
    assert "2 layers and 'teacher' 3; say which goes with which, such as {1: 1, 2: 3}" in refusal(matching(), deeper)


def test_a_projection_is_trained_with_the_student_and_kept(tiny_student, tiny_teacher, tmp_path):
    """The head is tied neither in this model nor read: it has to be frozen."""
    student = Pretrained(str(tiny_student), freeze="lm_head")
    teachers = {"teacher": Teacher(Frozen(Pretrained(str(tiny_teacher))))}
    module = make_module(student, teachers, matching({1: 1, 2: 2}, (32, 48)))
    before = {name: value.clone() for name, value in module.parts.state_dict().items()}
    head = module.student.lm_head.weight.clone()
    trainer = fit(module, tmp_path, steps=2, log_every_n_steps=100)
    assert torch.equal(module.student.lm_head.weight, head)
    after = module.parts.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=False)["state_dict"]
    assert {f"parts.{name}" for name in before} <= {*kept}


def test_a_head_that_nothing_reads_must_be_frozen(tiny_student, tmp_path):
    module = make_module(tiny_student, {"teacher": Teacher(Initial())}, matching())
    with pytest.raises(RuntimeError, match=r"lm_head.weight; they would not learn.*student.freeze"):
        fit(module, tmp_path, log_every_n_steps=100)
