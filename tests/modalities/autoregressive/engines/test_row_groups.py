"""Rows never influence each other: those that can't share a forward pass are read and written apart."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
import transformers

from opd_lightning.modalities.autoregressive import DecodeLoop, Generate
from opd_lightning.modalities.autoregressive.engines.row_groups import EqualLengths
from opd_lightning.modalities.autoregressive.models import rope_kinds, rope_switch
from opd_lightning.modalities.autoregressive.writing import engine_of
from opd_lightning.modalities.text.quickstart import character_tokenizer
from opd_lightning.pretrained import Pretrained
from opd_lightning.teacher import Frozen, Initial, Teacher
from tests.tiny import act, fit, make_module, no_teacher, save_model, teacher_forced

# short of the original context with their rollout, crossing it, and beyond it
ROWS = [{"prompt": p} for p in ("1=", "1" * 20 + "+1=", "12+1=", "1" * 14 + "=", "1" * 27 + "=", "2" * 14 + "=")]
SWITCH = 24


def rotated(folder, **rope):
    """A tiny Phi-3, or with ``rope`` of another type a Llama."""
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": SWITCH}
    kind = transformers.LlamaConfig if rope else transformers.Phi3Config
    config = kind(
        vocab_size=24, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.15, max_position_embeddings=rope.pop("context", 128),
        rope_parameters={"rope_theta": 1e4, **(rope or {"rope_type": "longrope", **factors})}, **ids,
        **({} if rope else {"original_max_position_embeddings": SWITCH}),
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def by_plain_transformers(module, acted) -> torch.Tensor:
    """``[B, T]`` the log-prob of each action from a forward pass over nothing but what came before it."""
    found = torch.zeros(acted.mask.shape)
    model = module.student.eval()
    for i, example in enumerate(acted.examples):
        ids = module.tokenizer()(example["prompt"])["input_ids"]
        for t in range(int(acted.mask[i].sum())):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, : module.vocabulary]
            found[i, t] = logits.log_softmax(-1)[acted.actions[i, t]]
            ids = [*ids, int(acted.actions[i, t])]
    return found


@pytest.mark.parametrize("engine", [DecodeLoop(), DecodeLoop(packed=False), Generate()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_longrope_switches_for_each_row_alone(engine, temperature, tmp_path):
    module = make_module(rotated(tmp_path), {"teacher": Teacher(Initial())}, engine=engine)
    assert rope_switch(module.student) == SWITCH
    acted = act(module, ROWS, horizon=20, temperature=temperature)
    length = torch.tensor([len(row["prompt"]) for row in ROWS]) + acted.length
    assert (length < SWITCH).any()
    assert (length > SWITCH).any()
    plain = by_plain_transformers(module, acted)
    torch.testing.assert_close(acted.behavior_log_probs, plain, atol=1e-4, rtol=1e-4)
    for who in ("student", "teacher"):
        torch.testing.assert_close(teacher_forced(module, who, acted), plain, atol=1e-4, rtol=1e-4)
    for i, example in enumerate(ROWS):
        rollout = replace(module.rollout, horizon=20, temperature=temperature)
        alone = module.act("student", [example], [1000 * i], rollout)
        width = int(acted.mask[i].sum())
        assert alone.actions[0, :width].tolist() == acted.actions[i, :width].tolist()


def test_a_run_over_the_switch_starts_and_trains(tmp_path):
    module = make_module(rotated(tmp_path / "s"), {"teacher": Teacher(Frozen(Pretrained(str(tmp_path / "s"))))})
    module.rollout.horizon = 20
    logged = fit(module, tmp_path, ROWS * 2).logged_metrics
    assert abs(float(logged["train/loss/ReverseKL"])) < 1e-6


@pytest.mark.parametrize("kind", ["yarn", "linear", "llama3"])
def test_rope_that_is_the_same_for_all_rows_is_left_alone(kind, tmp_path):
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    folder = rotated(tmp_path, rope_type=kind, factor=4.0, original_max_position_embeddings=SWITCH, **more)
    module = make_module(folder, {"teacher": Teacher(Initial())})
    assert not rope_kinds(module.student)
    acted = act(module, ROWS, horizon=20)
    torch.testing.assert_close(acted.behavior_log_probs, by_plain_transformers(module, acted), atol=1e-4, rtol=1e-4)


def test_dynamic_ntk_is_refused_beyond_its_context_and_right_before(tmp_path):
    folder = rotated(tmp_path, rope_type="dynamic", factor=4.0, context=32)
    module = make_module(folder, {"teacher": Teacher(Initial())})
    acted = act(module, ROWS[:1] + ROWS[2:4], horizon=10)
    torch.testing.assert_close(acted.behavior_log_probs, by_plain_transformers(module, acted), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="a row of 35 tokens is beyond the context of 32, where dynamic NTK"):
        act(module, ROWS[3:4], horizon=20)


# -- models that can't bear padding ---------------------------------------------------------------------------------


def recurrent(folder):
    return save_model(folder, config_class="RwkvConfig", attention_hidden_size=32, context_length=128)


def shifted(folder):
    """The decoder of Bart, which counts padding as positions."""
    sizes = {
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 64,
        "d_model": 32,
        "is_decoder": True,
    }
    return save_model(folder, config_class="BartConfig", is_encoder_decoder=False, init_std=0.15, **sizes)


@pytest.mark.parametrize("make", [recurrent, shifted])
def test_what_can_not_share_a_batch_is_written_apart(make, tmp_path, recwarn):
    module = make_module(make(tmp_path), {}, no_teacher())
    rows = ROWS[:4] + ROWS[:2]
    unaware = act(module, rows)
    apart = (unaware.behavior_log_probs - by_plain_transformers(module, unaware))[unaware.mask].abs().max()
    assert apart > 1e-3, "left padding does no harm"
    written = dict(module.audit_rows())["rollouts by"]["student"]
    assert ("one row at a time" if make is recurrent else "it can't bear padding") in written
    assert any("is not used as it is, which may take longer" in str(warning.message) for warning in recwarn)
    assert isinstance(engine_of(module, module.policies["student"]), EqualLengths)
    acted = act(module, rows)
    plain = by_plain_transformers(module, acted)
    torch.testing.assert_close(acted.behavior_log_probs, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(teacher_forced(module, "student", acted), plain, atol=1e-4, rtol=1e-4)


def test_the_comparison_finds_it_where_no_trial_was_made(tmp_path, monkeypatch):
    module = make_module(recurrent(tmp_path / "s"), {}, no_teacher())
    monkeypatch.setattr(type(module), "audit_rows", lambda self: [])
    with pytest.raises(RuntimeError, match="RwkvForCausalLM reads padding, caches or positions in a way of its own"):
        fit(module, tmp_path, ROWS * 2)


# -- what is refused ------------------------------------------------------------------------------------------------


def test_a_model_without_a_body_of_its_own(tmp_path):
    sizes = {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 64}
    module = make_module(save_model(tmp_path, config_class="Llama4TextConfig", **sizes), {}, no_teacher())
    with pytest.raises(ValueError, match=r"Llama4ForCausalLM has no body apart from its head .* not supported yet$"):
        module.audit_rows()


def test_a_model_that_sees_what_is_behind(tmp_path, monkeypatch):
    folder = save_model(tmp_path)
    module = make_module(folder, {}, no_teacher())
    forward = module.student.model.forward

    def both_ways(*args, **kwargs):
        said = forward(*args, **kwargs)
        said.last_hidden_state = said.last_hidden_state + said.last_hidden_state.mean(1, keepdim=True)
        return said

    monkeypatch.setattr(module.student.model, "forward", both_ways)
    with pytest.raises(ValueError, match=r"depends on those behind it .* `is_decoder: true`"):
        module.audit_rows()


def test_a_model_that_writes_otherwise_than_it_reads(tmp_path, monkeypatch):
    module = make_module(save_model(tmp_path), {}, no_teacher())
    forward = module.student.model.forward

    def forgetful(*args, use_cache=False, **kwargs):
        said = forward(*args, use_cache=use_cache, **kwargs)
        if use_cache:
            said.last_hidden_state = said.last_hidden_state * 1.1
        return said

    forgetful.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(module.student.model, "forward", forgetful)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM is not supported: it can't be let write"):
        module.audit_rows()
