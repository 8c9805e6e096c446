"""Adapters that were trained before, put on a base."""

from __future__ import annotations

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from opd_lightning.pretrained import Lora, Pretrained
from tests.test_self_teachers import save_adapter


def load(base, adapter, **settings) -> torch.nn.Module:
    return Pretrained(str(base), lora=Lora(adapter=str(adapter), **settings)).load(AutoModelForCausalLM, trained=True)


def test_an_adapter_of_another_width_is_named_with_both_shapes(saved, tmp_path):
    adapter = save_adapter(saved(seed=2, hidden=48, rows=28), tmp_path / "adapter")
    with pytest.raises(
        ValueError,
        match=r"adapter does not fit this base: base_model\S+ has the shape \S*\[4, 48\]\S* there, \S*\[4, 32\]",
    ):
        load(saved(), adapter)


@pytest.mark.parametrize(("of", "on", "fault"), [(3, 2, "no place for"), (2, 3, "needs and it lacks")])
def test_an_adapter_of_more_or_fewer_layers_is_refused(of, on, fault, saved, tmp_path):
    """Peft loads what fits, and says nothing of the rest, or warns."""
    adapter = save_adapter(saved(num_hidden_layers=of), tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=rf"in 4 weights, among them \S*layers\.2\.\S* of shape \(\d+, \d+\), .*{fault}"
    ):
        load(saved(num_hidden_layers=on), adapter)


def test_an_adapter_on_other_layers_is_refused(saved, tmp_path):
    adapter = save_adapter(saved(), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"among them \S*v_proj\S* of shape .* which this base has no place for"):
        load(saved(), adapter)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "is of the kind PREFIX_TUNING, not LORA"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "is of the kind IA3, not LORA"),
        (
            LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
            "tokens of the prom",
        ),
    ],
    ids=["prefix", "ia3", "alora"],
)
def test_what_is_no_lora_is_refused_by_name(config, message, saved, tmp_path):
    """Their virtual tokens, for one, would be left out by passes that ask the base's layers."""
    get_peft_model(AutoModelForCausalLM.from_pretrained(saved()), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"lora\.adapter: .*{message}"):
        load(saved(), tmp_path)


def test_an_adapter_imports_nothing_that_it_names(saved, tmp_path):
    adapter = save_adapter(saved(), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    named = {"megatron_config": {"a": 1}, "megatron_core": "a_module_that_is_not_there"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | named), encoding="utf-8")
    with pytest.raises(ValueError, match="megatron_config: it imports modules that its own configuration names"):
        load(saved(), adapter)


def test_a_missing_adapter_is_one_sentence(saved, tmp_path):
    for path in (tmp_path / "nowhere" / "else", saved()):
        with pytest.raises(FileNotFoundError, match=r"lora\.adapter: there is no (folder|adapter in) ") as caught:
            load(saved(), path)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [({"r": 8}, "r=8"), ({"alpha": 1}, "alpha=1"), ({"target_modules": ["q_proj"]}, "target_modul")],
)
def test_what_the_adapter_would_override_is_refused(given, message):
    with pytest.raises(ValueError, match=rf"lora\.{message}.* beside lora\.adapter would be ignored: x brings its own"):
        Lora(adapter="x", **given)
