"""`opd export`: the folder loads with plain transformers and scores as in validation."""

from __future__ import annotations

import json
import os
import re
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from opd_lightning import export
from opd_lightning.cli import run
from opd_lightning.modalities.text import TextDistillation
from opd_lightning.policy import Policy
from opd_lightning.portable import Portable
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout_settings import Rollout
from tests.callbacks import toy
from tests.exported import exportable
from tests.processes import last
from tests.test_resume import PLAIN, configuration
from tests.test_self_teachers import ADAPTERS, save_adapter
from tests.tiny import make_module, no_teacher, save_model
from tests.tiny_vlm import VLMS, save_vlm

SEEING = "opd_lightning.modalities.vision_language.VisionLanguageDistillation"

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def fit(config, *extra):
    run(["fit", "-c", str(config), "--trainer.max_steps=3", *extra])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, world):
    config = configuration(tmp_path_factory.mktemp("export"), world, PLAIN)
    fit(config)
    return config.parent / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--dtype=float61",
            "dtype: expected one of auto, float32, bfloat16, float16, got float61; did you mean float16?",
        ),
        ("--merge=perhaps", "merge: expected bool, got perhaps"),
        ("--merg=false", "--merg"),
        ("--trust=true", "--trust"),
    ],
)
def test_arguments_are_read_strictly(argument, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        export.export(["nowhere.ckpt", str(tmp_path / "out"), argument])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_an_adapter_that_is_not_there_is_not_written(trained, tmp_path):
    with pytest.raises(ValueError, match=r"--merge=false writes the adapter alone, and this student has none"):
        export.export([str(trained), str(tmp_path / "out"), "--merge=false"])
    assert not (tmp_path / "out").exists()


def test_exported_student_is_the_trained_one(trained, world, tmp_path):
    export.export([str(trained), str(tmp_path / "out")])
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
    inputs = reader.collate(examples, reader.policies["student"]) | reader.media(examples, reader.policies["student"])
    model = world.setting.model_class.from_pretrained(out)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for actions, mask, written in zip(rolled.actions, rolled.mask, ids, strict=True):
        assert written[: int(mask.sum())].tolist() == actions[mask].tolist()


def test_model_card_says_what_was_trained_from_what(trained, tmp_path, world):
    export.write(trained, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "1 × ReverseKL to `teacher`" in card
    assert f"* teacher `teacher`: Frozen, {world.teacher.name}\n" in card
    assert str(world.teacher.parent) not in card
    assert "for 3 optimizer steps" in card
    assert "max_steps: 3" in card


def test_lora_merged_and_as_adapter(tmp_path, world):
    config = configuration(tmp_path / "run", world, PLAIN)
    fit(config, "--model.student.lora.r=4")
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


@pytest.mark.parametrize(
    "student", [{}, {"lora": {"r": 4, "target_modules": ["q_proj", "qkv", "fc1"]}}], ids=["full", "lora"]
)
@pytest.mark.parametrize("architecture", VLMS)
def test_models_that_see_are_compared_with_an_image(architecture, student, tmp_path, capsys):
    base = save_vlm(tmp_path / "base", architecture)
    checkpoint = exportable(tmp_path / "x.ckpt", base, SEEING, **student)
    export.write(checkpoint, tmp_path / "out")
    assert "loaded again, it says what the trained student says" in capsys.readouterr().out
    if student:
        export.write(checkpoint, tmp_path / "adapter", merge=False)
    module, _, _ = export.load_module(checkpoint)
    other = module.model_class.from_pretrained(base)
    apart = module.probe(module.policies["student"]) - module.probe(Policy(other, module.policies["student"].processor))
    assert apart[36:].abs().max() > 0.01, "behind the image"


def test_a_student_beside_an_averaged_teacher_is_exported_alone(tmp_path, make_world):
    world = make_world("text")
    config = configuration(tmp_path / "run", world, {**PLAIN, "teacher": "ema"})
    fit(config, "--model.student.lora.r=4")
    assert any(".teacher." in name for name in last(config)["state_dict"])
    export.write(tmp_path / "run", tmp_path / "adapter", merge=False)
    assert not any("teacher" in file.name for file in (tmp_path / "adapter").rglob("*"))
    torch.testing.assert_close(
        said(tmp_path / "adapter", world.student), live(tmp_path / "run" / "checkpoints" / "last.ckpt")
    )


def said(folder, base=None) -> torch.Tensor:
    """Log-probs of what plain transformers (and peft) load."""
    model = AutoModelForCausalLM.from_pretrained(base or folder)
    model = PeftModel.from_pretrained(model, folder) if base else model
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 17)[None]).logits.float().log_softmax(-1)


def live(checkpoint) -> torch.Tensor:
    module, _, _ = export.load_module(checkpoint)
    with torch.no_grad():
        return module.eval().student(input_ids=torch.arange(3, 17)[None]).logits.float().log_softmax(-1)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
def test_adapters_on_heads_and_embeddings_are_exported_as_they_were_trained(targets, tied, tmp_path):
    """A head that is the embedding becomes one of its own: merged into both it would be another model."""
    base = save_model(tmp_path / "base", architecture="llama", tie_word_embeddings=tied)
    checkpoint = exportable(tmp_path / "x.ckpt", base, lora={"r": 4, "target_modules": targets})
    export.write(checkpoint, tmp_path / "merged")
    export.write(checkpoint, tmp_path / "adapter", merge=False)
    expected = live(checkpoint)
    assert (expected - said(base)).abs().max() > 0.1
    torch.testing.assert_close(said(tmp_path / "merged"), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(said(tmp_path / "adapter", base), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(ADAPTERS))
def test_whatever_an_adapter_trains_is_exported(kind, tied, tmp_path):
    base = save_model(tmp_path / "base", architecture="llama", tie_word_embeddings=tied, attention_bias=True)
    adapter = save_adapter(base, tmp_path / "start", **ADAPTERS[kind])
    checkpoint = exportable(tmp_path / "x.ckpt", base, lora={"adapter": str(adapter)})
    expected = live(checkpoint)
    assert (expected - said(adapter, base)).abs().max() > 0.1, "trained further"
    export.write(checkpoint, tmp_path / "merged")
    torch.testing.assert_close(said(tmp_path / "merged"), expected, atol=1e-4, rtol=1e-4)
    export.write(checkpoint, tmp_path / "adapter", merge=False)
    torch.testing.assert_close(said(tmp_path / "adapter", base), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication lets layers share their weights, .*--merge=false"),
        ({"lora_bias": True}, "can't be merged: .*base layer has no bias.*--merge=false"),
    ],
    ids=["layer_replication", "lora_bias"],
)
def test_what_no_merged_model_can_hold_is_refused(adapter, message, tmp_path):
    base = save_model(tmp_path / "base", architecture="llama")
    saved = save_adapter(base, tmp_path / "start", **adapter)
    checkpoint = exportable(tmp_path / "x.ckpt", base, lora={"adapter": str(saved)})
    with pytest.raises(ValueError, match=message):
        export.write(checkpoint, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))
    export.write(checkpoint, tmp_path / "adapter", merge=False)


def test_adapters_over_drawn_weights_are_exported_over_those_that_were_trained(tiny_student, tmp_path):
    """Nobody else has them: they are in the checkpoint, and an adapter alone would be worth nothing."""
    torch.manual_seed(5)
    drawn = {"random_init": True, "lora": {"r": 2}}
    checkpoint = exportable(tmp_path / "x.ckpt", tiny_student, **drawn)
    torch.manual_seed(99)
    expected = live(checkpoint)
    torch.manual_seed(5)
    assert torch.equal(expected, live(checkpoint))
    export.write(checkpoint, tmp_path / "out")
    torch.testing.assert_close(said(tmp_path / "out"), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(
        ValueError, match=r"base was drawn \(random_init\), so nobody else has it; export with --merge=true"
    ):
        export.write(checkpoint, tmp_path / "adapter", merge=False)


# -- what else belongs to a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shipped", "kept", "gone"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9, "do_sample": True}, ()),
        ({"do_sample": False, "temperature": 0.6}, {"do_sample": False}, ("temperature",)),
        ({"length_penalty": 2.0, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}, ("length_penalty",)),
        ({"early_stopping": True, "output_scores": True}, {}, ("early_stopping", "output_scores")),
    ],
    ids=["sampling", "greedy", "beams", "outputs"],
)
def test_generation_settings_that_cannot_be_saved_are_repaired_and_told(shipped, kept, gone, tmp_path, caplog):
    base = save_model(tmp_path / "base", generation=shipped)
    with caplog.at_level("INFO"):
        export.write(exportable(tmp_path / "x.ckpt", base), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert kept.items() <= found.items()
    assert not set(gone) & found.keys()
    for name in (*gone, *(["do_sample"] if "do_sample" in kept and "do_sample" not in shipped else [])):
        assert f"{name}" in caplog.text


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [True, False], ids=["pad", "no pad"])
def test_the_tokenizer_is_the_bases(side, pad, tmp_path):
    base = save_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side=side)
    if not pad:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    export.write(exportable(tmp_path / "x.ckpt", base), tmp_path / "out")
    found, was = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", base))
    assert (found.padding_side, found.pad_token) == (was.padding_side, was.pad_token)
    assert was.padding_side == side


@pytest.mark.parametrize("student", [{}, {"lora": {"r": 4}}], ids=["full", "lora"])
@pytest.mark.parametrize(("dtype", "written"), [("auto", "bfloat16"), ("float32", "float32")])
def test_weights_are_of_the_bases_dtype_and_what_rounding_costs_is_told(dtype, written, student, tmp_path, capsys):
    base = save_model(tmp_path / "base", dtype=torch.bfloat16)
    checkpoint = exportable(tmp_path / "x.ckpt", base, **student)
    export.write(checkpoint, tmp_path / "out", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{written}"}
    told = re.search(r"a difference of (\d+)\.\d% of what training changed, which was", capsys.readouterr().out)
    if written == "bfloat16":
        assert told is not None
        assert int(told[1]) < 50


# -- refusals -------------------------------------------------------------------------------------------------------


def test_an_export_that_fails_leaves_nothing_and_can_be_repeated(tiny_student, tmp_path, monkeypatch):
    checkpoint = exportable(tmp_path / "x.ckpt", tiny_student, lora={"r": 4})
    with monkeypatch.context() as broken:
        broken.setattr(export, "merged", lambda model: model.unload())  # the adapter is lost
        with pytest.raises(
            ValueError, match=r"differs from the trained student by \S+ of the spread .* nothing is expor"
        ):
            export.write(checkpoint, tmp_path / "out")
    with monkeypatch.context() as broken:
        broken.setattr(export, "model_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export.write(checkpoint, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]
    (tmp_path / ".out.part").mkdir()  # of one that was killed
    (tmp_path / "out").mkdir()
    export.write(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / ".out.part").exists()


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_merging_into_a_base_that_is_stored_quantized_is_refused(bits, tmp_path):
    base = save_model(tmp_path / "base", hidden=64)
    how = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    AutoModelForCausalLM.from_pretrained(base, quantization_config=how).save_pretrained(tmp_path / "stored")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "stored")
    checkpoint = exportable(tmp_path / "x.ckpt", tmp_path / "stored", lora={"r": 4})
    with pytest.raises(ValueError, match=rf"quantized \(bitsandbytes, {bits} bit\); to merge would .* --merge=false"):
        export.write(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export.write(checkpoint, tmp_path / "out", merge=False)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_runs_folder_is_its_newest_checkpoint(tiny_student, tmp_path, capsys):
    run = tmp_path / "run"
    for number, name in enumerate(["last.ckpt", "step-1.ckpt"]):
        os.utime(exportable(run / "checkpoints" / name, tiny_student, seed=number), (number, number))
    for i, folder in enumerate((run, run / "checkpoints")):
        export.write(folder, tmp_path / f"out{i}")
        assert "its newest checkpoint is step-1.ckpt" in capsys.readouterr().out
        torch.testing.assert_close(said(tmp_path / f"out{i}"), live(run / "checkpoints" / "step-1.ckpt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no checkpoint"):
        export.write(tmp_path / "empty", tmp_path / "out")


def test_a_base_that_is_gone_is_one_sentence(tmp_path):
    base = save_model(tmp_path / "base")
    checkpoint = exportable(tmp_path / "x.ckpt", base)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match=r"needs the base that it was trained from, .* there is no folder .*/base;"
    ):
        export.write(checkpoint, tmp_path / "out")


def test_another_model_in_the_place_of_the_base_is_refused(tmp_path):
    """Adapters over other weights would be exported as if they were those that were trained."""
    base = save_model(tmp_path / "base")
    adapters = exportable(tmp_path / "adapters.ckpt", base, lora={"r": 4})
    weights = exportable(tmp_path / "weights.ckpt", base)
    save_model(base, seed=7)
    with pytest.raises(ValueError, match=r"base holds other weights now than those that the adapter in the checkp"):
        export.write(adapters, tmp_path / "out")
    export.write(weights, tmp_path / "out")  # has all of them
    save_model(base, hidden=48)
    for checkpoint in (adapters, weights):
        with pytest.raises(ValueError, match=r"base (holds other weights|is another model) now"):
            export.write(checkpoint, tmp_path / "again")


class Written(TextDistillation):
    """A setting of one's own, whose models are no transformers."""

    def save_student(self, model, folder):
        Portable.save_student(self, nn.Linear(2, 2), folder)


def test_a_setting_of_ones_own_is_imported_when_trusted_and_asked_how_it_is_written(tiny_student, tmp_path):
    checkpoint = exportable(tmp_path / "x.ckpt", tiny_student, setting=f"{__name__}.Written")
    with pytest.raises(ValueError, match=r"asks for the setting \S+\.Written to be run; .* --trust_remote_code=true"):
        export.write(checkpoint, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"Written: a Linear has no save_pretrained, so its setting must say how it is wr"
    ):
        export.write(checkpoint, tmp_path / "out", trust_remote_code=True)
    assert not (tmp_path / "out").exists()


def test_models_that_are_loaded_in_a_way_of_their_own_need_methods_of_their_own():
    with pytest.raises(ValueError, match=r"Moves needs save_student and read_student to export Mover"):
        toy.make_module().check_portable()
    half = type("Half", (toy.Moves,), {"save_student": Written.save_student})
    with pytest.raises(ValueError, match=r"Half needs read_student to export Mover"):
        toy.make_module(setting=half).check_portable()
    assert toy.make_module().stored_dtype(Pretrained("0")) is None, "nobody is asked for a model called 0"


def test_refuses_a_full_folder_and_a_foreign_checkpoint(trained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("", encoding="utf-8")
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
