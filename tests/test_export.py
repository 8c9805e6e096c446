"""`opd export`: the folder loads with plain transformers and scores as in validation."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning import export
from opd_lightning.cli import run
from tests.test_resume import PLAIN, configuration, last


def fit(config, *extra):
    run(["fit", "-c", str(config), "--trainer.max_steps=3", *extra])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_student, tiny_teacher, tiny_data):
    config = configuration(tmp_path_factory.mktemp("export"), tiny_student, tiny_teacher, tiny_data, PLAIN)
    fit(config)
    return config.parent / "checkpoints" / "last.ckpt"


def test_exported_student_is_the_trained_one(trained, tmp_path):
    run(["export", str(trained), str(tmp_path / "out")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = torch.load(trained, weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[f"student.{name}"]), name


def test_exported_student_generates_as_in_validation(trained, tmp_path):
    export.write(trained, tmp_path / "out")
    module, _, _ = export.load_module(trained)
    examples = [{"prompt": "12+34="}, {"prompt": "5+6="}]
    module.evaluation.horizon = 8
    ours = [row["completion"] for row in predict(module, examples)]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompts = tokenizer([e["prompt"] for e in examples], padding=True, return_tensors="pt")
    prompts.pop("token_type_ids", None)
    ids = model.generate(**prompts, max_new_tokens=8, do_sample=False)
    width = prompts["input_ids"].shape[1]
    assert tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True) == ours


def predict(module, examples):
    from opd_lightning.rollout import Rollout

    trajectories = module.act("student", examples, [0] * len(examples), Rollout(horizon=8, temperature=0.0))
    return module.score(trajectories)[1]


def test_model_card_says_what_was_trained_from_what(trained, tmp_path, tiny_teacher):
    export.write(trained, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "ReverseKL" in card
    assert str(tiny_teacher) in card
    assert "for 3 optimiser steps" in card
    assert "max_steps: 3" in card


def test_lora_merged_and_as_adapter(tmp_path, tiny_student, tiny_teacher, tiny_data):
    config = configuration(tmp_path / "run", tiny_student, tiny_teacher, tiny_data, PLAIN)
    fit(config, "--model.init_args.student.lora.r=4")
    checkpoint = config.parent / "checkpoints" / "last.ckpt"
    names = last(config)["state_dict"]
    assert names
    assert all("lora_" in name for name in names), "a LoRA checkpoint holds the adapter only"

    export.write(checkpoint, tmp_path / "merged")
    export.write(checkpoint, tmp_path / "adapter", merge=False)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapter = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.arange(6)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_student)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(merged(ids).logits, base(ids).logits, atol=1e-5)


def test_refuses_a_full_folder_and_a_foreign_checkpoint(trained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(FileExistsError, match="export into a new folder"):
        export.write(trained, tmp_path / "full")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="only checkpoints of `opd fit` can be exported"):
        export.write(tmp_path / "foreign.ckpt", tmp_path / "out")


def test_ids_that_could_be_no_action_stay_impossible_after_export(trained, tmp_path):
    export.write(trained, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    known = len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert model.generation_config.suppress_tokens == list(range(known, model.config.vocab_size))
