"""What models are loaded from, quantized bases among them."""

from __future__ import annotations

import inspect
import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

import opd_lightning.pretrained
from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Frozen, Initial, Live, Teacher
from tests.test_self_teachers import save_adapter
from tests.tiny import LongerIsBetter, act, fit, make_module, make_rows, sgd, teacher_forced

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def load(path, trained: bool = True, **settings) -> torch.nn.Module:
    return Pretrained(str(path), **settings).load(AutoModelForCausalLM, trained)


def test_dtypes(saved):
    half = saved(dtype=torch.bfloat16)
    assert {p.dtype for p in load(half).parameters()} == {torch.float32}, "trained weights are float32"
    assert {p.dtype for p in load(half, trained=False).parameters()} == {torch.bfloat16}, "frozen ones as they came"
    assert {p.dtype for p in load(half, dtype="bfloat16").parameters()} == {torch.bfloat16}
    found = {
        name.split(".")[-2]: p.dtype for name, p in load(half, lora=Lora(r=2)).named_parameters() if "q_proj" in name
    }
    assert found == {"base_layer": torch.bfloat16, "default": torch.float32}


def test_what_is_trained(tiny_student):
    full, frozen = load(tiny_student), load(tiny_student, trained=False)
    assert all(p.requires_grad for p in full.parameters())
    assert full.training
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.training
    adapted = load(tiny_student, lora=Lora(r=2, target_modules=["q_proj"]))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all("q_proj.lora_" in name for name in trained)


def test_random_init_is_seeded_and_takes_only_the_architecture(tiny_student):
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return load(tiny_student, random_init=True).get_input_embeddings().weight

    assert torch.equal(drawn(5), drawn(5))
    assert not torch.equal(drawn(5), drawn(6))
    assert not torch.equal(drawn(5), load(tiny_student).get_input_embeddings().weight)
    assert drawn(5).dtype == torch.float32


def test_code_of_a_checkpoint_is_not_run_unless_asked_for(tiny_student, monkeypatch):
    assert inspect.signature(Pretrained).parameters["trust_remote_code"].default is False
    seen = []

    class Loader:
        @classmethod
        def from_pretrained(cls, path, **settings):
            seen.append(settings["trust_remote_code"])
            return AutoModelForCausalLM.from_pretrained(path)

    for trust in (False, True):
        Pretrained(str(tiny_student), trust_remote_code=trust).load(Loader, trained=True)
    assert seen == [False, True]


def test_a_saved_adapter_is_where_training_starts(tiny_student, tmp_path):
    model = load(tiny_student, lora=Lora(r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    again, frozen = (load(tiny_student, trained, lora=Lora(adapter=str(tmp_path))) for trained in (True, False))
    ids = torch.arange(2, 10)[None]
    for other in (again, frozen):
        assert torch.allclose(other(ids).logits, model(ids).logits, atol=1e-5)
    assert any(p.requires_grad for p in again.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing_but_memory(tiny_student, tiny_teacher, lora):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        spec = Pretrained(str(tiny_student), lora=lora, gradient_checkpointing=checkpointing)
        module = make_module(spec, tiny_teacher, pass_tokens=40)
        rolled = act(module, make_rows(8))
        calls: list[int] = []
        attention = next(m for name, m in module.student.named_modules() if name.endswith("layers.0.self_attn"))
        attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        streams = module.streams.query_all(module.objective.teachers(), rolled)
        loss, _ = module.objective(module.distribution(module.policies["student"], rolled), streams, rolled)
        forward = len(calls)
        loss.backward()
        assert len(calls) == (2 * forward if checkpointing else forward), "recomputed in the backward pass"
        assert forward > 1, "several passes"
        found.append((loss.detach(), [p.grad for p in module.student.parameters() if p.requires_grad]))
    assert any(gradient.abs().max() > 1e-3 for gradient in found[0][1])
    torch.testing.assert_close(found[1], found[0], atol=1e-7, rtol=1e-5)


# -- refusals -----------------------------------------------------------------------------------------------------


def test_a_quantized_student_needs_adapters(tiny_student):
    with pytest.raises(ValueError, match=r"student\.quantization=4bit: quantized weights have no gradient; set .*lora"):
        load(tiny_student, quantization="4bit")


def test_without_bitsandbytes_the_extra_is_named(tiny_student, monkeypatch):
    monkeypatch.setattr(opd_lightning.pretrained, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"quantization: 8bit needs bitsandbytes: pip install 'opd-lightning\["
    ):
        load(tiny_student, trained=False, quantization="8bit")


def test_a_fresh_adapter_on_a_teacher_is_refused(tiny_student):
    with pytest.raises(ValueError, match="a teacher's lora needs `adapter`: fresh adapters would change nothing"):
        load(tiny_student, trained=False, lora=Lora())


def test_what_a_path_would_ignore_is_refused(tiny_student):
    with pytest.raises(ValueError, match="random_init draws new weights: quantization=4bit has nothing to quantize"):
        Pretrained(str(tiny_student), random_init=True, quantization="4bit", lora=Lora())
    with pytest.raises(ValueError, match="gradient_checkpointing: a teacher has no backward pass"):
        load(tiny_student, trained=False, gradient_checkpointing=True)


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "compressed-tensors", "config_groups": {}},
    ],
    ids=lambda stored: stored["quant_method"],
)
def test_a_base_that_is_stored_quantized_needs_adapters(stored, tiny_student, tmp_path):
    """Whatever wrote it, and though ``quantization`` is not set."""
    folder = shutil.copytree(tiny_student, tmp_path / "stored")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}), encoding="utf-8")
    with pytest.raises(
        ValueError, match=rf"stored is stored quantized \({stored['quant_method']}.*; set student\.lora"
    ):
        load(folder)
    for given in ({"quantization": "8bit"}, {"random_init": True}):
        with pytest.raises(ValueError, match=r"stored is stored quantized already .*; leave it out"):
            load(folder, lora=Lora(), **given)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{tmp}/nowhere", "there is no folder /.*/nowhere; give a folder that holds a model, or a hub name"),
        ("./nowhere", r"there is no folder \./nowhere"),
        ("models/mine/v2", "there is no folder models/mine/v2"),
        ("no-such-model", "no-such-model can't be loaded: "),
    ],
)
def test_a_wrong_path_is_one_sentence(path, message, tmp_path, monkeypatch):
    # without a network the hub's client would try again for a minute
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for trained in (True, False):
        with pytest.raises(OSError, match=message) as caught:
            load(path.format(tmp=tmp_path), trained)
        assert len(str(caught.value).splitlines()) == 1
        assert caught.value.__cause__ is None


# -- quantized, on a CPU ------------------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_teacher_teaches(tiny_student, saved, quantization, tmp_path):
    wide = saved(seed=2, hidden=64, head_dim=32)
    frozen = Frozen(Pretrained(str(wide), quantization=quantization))
    module = make_module(tiny_student, {"teacher": Teacher(frozen)}, reward=LongerIsBetter())
    kinds = {type(layer).__name__ for layer in module.policies["teacher"].model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    trainer = fit(module, tmp_path, steps=2, validation=make_rows(4))
    assert 0 < float(trainer.callback_metrics["train/loss/ReverseKL"]) < 20
    plain = make_module(tiny_student, wide)
    rolled = act(plain, make_rows(8), "teacher")
    error = (teacher_forced(module, "teacher", rolled) - rolled.behavior_log_probs)[rolled.mask].abs().mean()
    assert error < 0.5, "quantized, not another model"


def repacked(module) -> list[bool]:
    states = [getattr(getattr(layer, "weight", None), "quant_state", None) for layer in module.student.modules()]
    return [getattr(state, "packing_format_for_cpu", False) for state in states if state is not None]


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_the_gradient_of_adapters_is_the_same_after_an_evaluation(quantization, saved, tiny_teacher):
    """Bitsandbytes would lose what passes through the base, silently, and leave the rest of the gradient."""
    spec = Pretrained(str(saved(hidden=64, head_dim=32)), quantization=quantization, lora=Lora(r=2))
    module = make_module(spec, tiny_teacher)
    with torch.no_grad():
        for name, parameter in module.student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    batch = module.act("dataset", make_rows(8), [0] * 8)

    def gradients() -> list[torch.Tensor]:
        module.zero_grad()
        streams = module.streams.query_all(module.objective.teachers(), batch)
        module.objective(module.distribution(module.policies["student"], batch), streams, batch)[0].backward()
        return [p.grad.clone() for p in module.student.parameters() if p.requires_grad]

    before = gradients()
    module.eval()
    act(module, make_rows(4))
    with torch.no_grad():
        module.distribution(module.policies["student"], batch)
    module.train()
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("made", ["frozen", "initial", "ema", "live"])
def test_adapters_on_a_quantized_student_learn_after_rollouts(quantization, made, tiny_teacher, saved, tmp_path):
    """Rollout, teacher and validation run in evaluation mode, and the next backward pass must not notice (rule 18)."""
    weights = {"frozen": Frozen(Pretrained(str(tiny_teacher))), "initial": Initial(), "ema": EMA(0.5), "live": Live()}
    base = saved(hidden=64, head_dim=32)
    view = PromptView("{{ solution }}?{{ prompt }}") if made in ("initial", "ema") else None  # something to learn
    # a fresh adapter would hide half of the gradients
    adapter = save_adapter(base, tmp_path / "adapter", r=2, target_modules="all-linear")
    module = make_module(
        Pretrained(str(base), quantization=quantization, lora=Lora(adapter=str(adapter))),
        {"teacher": Teacher(weights[made], view)},
        rollout=Rollout(batch_size=4, horizon=4),
        reward=LongerIsBetter(),
        evaluation=Evaluation(before=True),
        optimizer=sgd(1.0),
    )
    kinds = {type(layer.base_layer).__name__ for layer in module.student.modules() if hasattr(layer, "base_layer")}
    assert kinds == {"Linear4bit" if quantization == "4bit" else "Linear8bitLt"}
    before = {name: p.detach().clone() for name, p in module.student.named_parameters() if p.requires_grad}
    trainer = fit(module, tmp_path, steps=3, validation=make_rows(4), val_check_interval=1)
    assert trainer.global_step == 3
    assert not any(repacked(module))
    if made != "live":  # its teacher is the student: nothing to learn
        moved = [
            name for name, p in module.student.named_parameters() if name in before and not torch.equal(p, before[name])
        ]
        assert set(moved) == set(before)
