"""`opd export`: the folder loads with plain transformers and scores as in validation."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from opd_lightning import export
from opd_lightning.cli import run
from opd_lightning.rollout import Rollout
from tests.processes import last
from tests.test_resume import PLAIN, configuration
from tests.tiny import make_module, no_teacher


def fit(config, *extra):
    run(["fit", "-c", str(config), "--trainer.max_steps=3", *extra])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, world):
    config = configuration(tmp_path_factory.mktemp("export"), world, PLAIN)
    fit(config)
    return config.parent / "checkpoints" / "last.ckpt"


def test_exported_student_is_the_trained_one(trained, world, tmp_path):
    run(["export", str(trained), str(tmp_path / "out")])
    model = world.setting.model_class.from_pretrained(tmp_path / "out")
    state = torch.load(trained, weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[f"student.{name}"]), name


def test_exported_student_generates_as_in_validation(trained, world, tmp_path):
    """Loaded and asked with plain transformers, over inputs of the exported processor."""
    out, examples = tmp_path / "out", world.make_rows(6)
    export.write(trained, out)
    module, _, _ = export.load_module(trained)
    rolled = module.act("student", examples, [0] * len(examples), Rollout(horizon=8, temperature=0.0))
    reader = make_module(out, {}, no_teacher(), setting=world.setting)
    inputs = reader.collate(examples) | reader.media(examples, reader.policies["student"])
    model = world.setting.model_class.from_pretrained(out)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for actions, mask, written in zip(rolled.actions, rolled.mask, ids, strict=True):
        assert written[: int(mask.sum())].tolist() == actions[mask].tolist()


def test_model_card_says_what_was_trained_from_what(trained, tmp_path, world):
    export.write(trained, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "ReverseKL" in card
    assert str(world.teacher) in card
    assert "for 3 optimiser steps" in card
    assert "max_steps: 3" in card


def test_lora_merged_and_as_adapter(tmp_path, world):
    config = configuration(tmp_path / "run", world, PLAIN)
    fit(config, "--model.init_args.student.lora.r=4")
    checkpoint = config.parent / "checkpoints" / "last.ckpt"
    names = last(config)["state_dict"]
    assert names
    assert all("lora_" in name for name in names), "a LoRA checkpoint holds the adapter only"

    export.write(checkpoint, tmp_path / "merged")
    export.write(checkpoint, tmp_path / "adapter", merge=False)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    load = world.setting.model_class.from_pretrained
    merged = load(tmp_path / "merged")
    adapter = PeftModel.from_pretrained(load(world.student), tmp_path / "adapter")
    ids = torch.arange(20, 26)[None] % 17
    base = load(world.student)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, adapter(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(merged(input_ids=ids).logits, base(input_ids=ids).logits, atol=1e-5)


def test_refuses_a_full_folder_and_a_foreign_checkpoint(trained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(FileExistsError, match="export into a new folder"):
        export.write(trained, tmp_path / "full")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="only checkpoints of `opd fit` can be exported"):
        export.write(tmp_path / "foreign.ckpt", tmp_path / "out")


def test_ids_that_could_be_no_action_stay_impossible_after_export(trained, world, tmp_path):
    export.write(trained, tmp_path / "out")
    model = world.setting.model_class.from_pretrained(tmp_path / "out")
    module, _, _ = export.load_module(trained)
    rows = model.get_output_embeddings().weight.shape[0]
    assert model.generation_config.suppress_tokens == sorted({*module.suppressed(), *range(module.vocabulary, rows)})
