"""Dropout and router noise of a checkpoint are off, unless they are asked for."""

from __future__ import annotations

import pytest
import torch
import transformers

from opd_lightning.modalities.text.quickstart import character_tokenizer
from opd_lightning.noise import noise
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.teacher import Live, Teacher
from tests.tiny import act, fit, make_module, make_rows, teacher_forced

SIZES = {
    "vocab_size": 24, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.15,
}  # fmt: skip
MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "router_jitter_noise": 0.3}
# residual, embedding and attention dropout; of whole layers; of routers; read from the configuration
MODELS = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}),
    "qwen2": ("Qwen2Config", {"attention_dropout": 0.2}),
    "phi": ("PhiConfig", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}),
    "opt": (
        "OPTConfig",
        {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.2, "attention_dropout": 0.1, "layerdrop": 0.5},
    ),
    "gpt_neox": ("GPTNeoXConfig", {"attention_dropout": 0.2, "hidden_dropout": 0.2}),
    "falcon": ("FalconConfig", {"attention_dropout": 0.2, "hidden_dropout": 0.2, "multi_query": False}),
    "mixtral": ("MixtralConfig", MIXTRAL),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 8, "num_experts_per_tok": 2, "router_jitter_noise": 0.3}),
}


def brought(name: str, folder):
    kind, settings = MODELS[name]
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = getattr(transformers, kind)(**SIZES | ids | settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_student_agrees_with_itself(name, tmp_path):
    module = make_module(brought(name, tmp_path / "s"), {"teacher": Teacher(Live())})
    logged = fit(module, tmp_path / "run").logged_metrics
    assert float(logged["train/loss/ReverseKL"]) < 1e-6
    assert module.student.training
    assert noise(module.student) == 0
    rolled = act(module, make_rows(8))
    ratio = (teacher_forced(module, "student", rolled) - rolled.behavior_log_probs)[rolled.mask].exp()
    assert (ratio - 1).abs().max() < 1e-4, "a fresh rollout has importance ratio 1 in the training step"
    assert dict(module.audit_rows())["dropout"] == {"student": "off", "teacher": "off"}


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_the_configuration_that_is_exported_stays_as_it_came(name, tmp_path):
    folder = brought(name, tmp_path / "s")
    config = make_module(folder, {"teacher": Teacher(Live())}).student.config
    assert config.to_dict() == transformers.AutoConfig.from_pretrained(folder).to_dict() | {
        key: config.to_dict()[key] for key in ("_name_or_path", "dtype") if key in config.to_dict()
    }


def test_it_is_on_where_it_is_asked_for_and_the_run_still_starts(tmp_path):
    student = Pretrained(str(brought("gpt2", tmp_path / "s")), dropout=True)
    module = make_module(student, {"teacher": Teacher(Live())})
    logged = fit(module, tmp_path / "run").logged_metrics
    assert float(logged["train/loss/ReverseKL"]) > 1e-3
    assert dict(module.audit_rows())["dropout"]["student"] == "up to 0.1 in training, as asked for"


@pytest.mark.parametrize(("rate", "kept"), [(0.0, 0.0), (0.3, 0.3)])
@pytest.mark.parametrize("saved_rate", [0.0, 0.5])
def test_dropout_of_a_saved_adapter_is_that_of_the_run(rate, kept, saved_rate, tiny_student, tmp_path):
    first = Pretrained(str(tiny_student), lora=Lora(r=2, dropout=saved_rate))
    make_module(first, {"teacher": Teacher(Live())}).student.save_pretrained(tmp_path)
    spec = Pretrained(str(tiny_student), lora=Lora(dropout=rate, adapter=str(tmp_path)))
    module = make_module(spec, {"teacher": Teacher(Live())})
    assert noise(module.student) == kept
    rolled = act(module, make_rows(4))
    torch.manual_seed(0)
    once = teacher_forced(module, "student", rolled)
    assert torch.equal(once, teacher_forced(module, "student", rolled)) or rate > 0


def test_a_teacher_has_none(tiny_student):
    with pytest.raises(ValueError, match="always asked in evaluation mode"):
        Pretrained(str(tiny_student), dropout=True).load(transformers.AutoModelForCausalLM, trained=False)
