"""Steered teachers against hidden states that transformers shows, and the ids that they favor, by hand."""

from __future__ import annotations

import sys

import pytest
import torch

from opd_lightning.methods import steering
from opd_lightning.methods.steering import Steered, favored
from opd_lightning.objective import Objective, ReverseKL, Support, Term
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.teacher import Initial, Teacher
from tests.methods.world import V, World
from tests.objective.reference import close
from tests.tiny import act, fit, log_softmax, make_module, make_rows

TOWARD, AWAY = ["12+34=", "99+99="], ["0+0=", "1+0=", "11="]


def steered(student, strength=1.0, objective=None, **settings):
    spec = Pretrained(str(student), **settings)
    return make_module(spec, {"teacher": Teacher(Steered(1, TOWARD, AWAY, strength))}, objective)


@torch.no_grad()
def states(module, prompt, number):
    """``[T, H]`` what a layer reads, as transformers shows it."""
    ids = module.tokenizer()(prompt, return_tensors="pt").input_ids
    return module.policies["student"].model(input_ids=ids, output_hidden_states=True).hidden_states[number][0]


def test_a_layer_reads_the_difference_of_means_besides(student):
    module = steered(student, 0.5)
    teacher, seen = module.policies["teacher"], []
    layer = steering.layer_of(teacher.model, 1)
    ids = module.tokenizer()("5+5=", return_tensors="pt").input_ids
    with teacher.active(), steering.hooked(layer, lambda _, inputs: seen.append(inputs[0][0])), torch.no_grad():
        teacher.model(input_ids=ids)
    toward, away = (torch.stack([states(module, p, 1)[-1] for p in side]).mean(0) for side in (TOWARD, AWAY))
    expected = states(module, "5+5=", 1) + 0.5 * (toward - away)
    close(seen[0], expected, 1e-5)
    module = make_module(student, {"teacher": Teacher(Steered(1, TOWARD, AWAY)), "initial": Teacher(Initial())})
    acted = act(module, make_rows(4))
    assert (log_softmax(module, "teacher", acted) - log_softmax(module, "initial", acted)).abs().max() > 0.01


def test_without_strength_it_is_the_student_before_training(tiny_student, tmp_path):
    module = steered(tiny_student, 0.0)
    acted = act(module, make_rows(4))
    assert torch.equal(log_softmax(module, "teacher", acted), log_softmax(module, "student", acted))
    trainer = fit(module, tmp_path, steps=1)
    assert abs(float(trainer.callback_metrics["train/loss/ReverseKL"])) < 1e-6


@pytest.mark.parametrize("lora", [None, Lora(r=2)])
def test_it_stands_still_while_the_student_moves_and_leaves_it_alone(tiny_student, tmp_path, lora):
    support = Support("ids", ids=(2, 3, 4), remainder="drop")
    module = steered(tiny_student, 1.0, Objective([Term(ReverseKL(support=support))]), lora=lora)
    acted = act(module, make_rows(4))
    before = {name: log_softmax(module, name, acted) for name in ("student", "teacher")}
    assert torch.equal(log_softmax(module, "student", acted), before["student"]), "its direction is the teacher's alone"
    fit(module, tmp_path, steps=2)
    assert torch.equal(log_softmax(module, "teacher", acted), before["teacher"])
    assert not torch.equal(log_softmax(module, "student", acted), before["student"])


def test_on_all_ids_the_slice_is_the_whole_divergence():
    world = World(4)
    whole, slice_ = (
        Term(ReverseKL(support=support)) for support in (Support(), Support("ids", ids=range(V), remainder="drop"))
    )
    close(world.loss(slice_), world.loss(whole), 1e-6)
    for one, other in zip(world.gradients(slice_), world.gradients(whole), strict=True):
        close(one, other, 1e-6)


def test_other_ids_move_only_as_the_normalizer_does():
    """Ratios of probabilities outside of the slice have no gradient, so that dL/dz_v / p_v is the same there."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, V, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(5, V, generator=generator, dtype=torch.float64).log_softmax(-1)
    p, q = Support("ids", ids=(0, 3), remainder="drop").restrict(logits.log_softmax(-1), teacher, torch.zeros(5).long())
    (p.exp() * (p - q)).sum().backward()
    outside = (logits.grad / logits.detach().softmax(-1))[:, [1, 2, 4, 5]]
    close(outside, outside[:, :1].expand_as(outside), 1e-9)
    assert outside.abs().min() > 0


def test_ids_are_elected_by_the_steps_in_which_they_gain_most():
    gain = torch.tensor([[0.0, 3.0, 2.0, 1.0], [5.0, 4.0, 0.0, 0.0]])
    other = torch.tensor([[-1.0, 0.5, -2.0, 0.7]])
    # votes: 0 has one, 1 three, 2 one, 3 one
    assert favored([gain, other], each=2, count=1) == [1]
    assert favored([gain, other], each=2, count=2) == [0, 1]


def test_the_script_prints_the_ids(tiny_student, tmp_path, monkeypatch, capsys):
    for name, prompts in (("toward", TOWARD), ("away", AWAY)):
        lines = "".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    files = [f"--toward={tmp_path / 'toward.jsonl'}", f"--away={tmp_path / 'away.jsonl'}"]
    few = ["--layer=1", f"--on={tmp_path / 'away.jsonl'}", "--rollouts=2", "--steps=3", "--each=2", "--ids=4"]
    monkeypatch.setattr(sys, "argv", ["steering", str(tiny_student), *files, *few])
    steering.main()
    ids = eval(capsys.readouterr().out.strip().removeprefix("ids: "))
    assert len(ids) == 4
    assert ids == sorted(set(ids))


def test_what_cannot_be_steered_is_refused(tiny_student, tmp_path):
    with pytest.raises(ValueError, match=r"Steered\.away names no prompts"):
        Steered(0, ["a"], [])
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"Steered\.toward: .*rows\.jsonl, row 2: there is no text in the column"):
        Steered(0, str(tmp_path / "rows.jsonl"), ["a"])
    with pytest.raises(ValueError, match=r"Steered\.layer=2: Qwen3ForCausalLM has the layers 0 to 1"):
        make_module(tiny_student, {"teacher": Teacher(Steered(2, ["1"], ["2"]))})
