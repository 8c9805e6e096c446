"""Teachers that begin as the student, over everything that an adapter can train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from opd_lightning.adapters import adapter_parameters
from opd_lightning.audit import warn_of_idle_views
from opd_lightning.modalities.autoregressive import FirstOf, PromptView
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.teacher import EMA, Frozen, Initial, Live, Teacher, TeacherWeights, rounded_at_random
from tests.test_note import Numbered
from tests.tiny import act, fit, log_softmax, make_module, make_rows, save_model, sgd

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 16}, "target_modules": ["q_proj", "v_proj"]},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 3}, "target_modules": ["q_proj", "v_proj"]},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "norms": {"modules_to_save": ["input_layernorm"]},
    "tokens": {"trainable_token_indices": [5, 9]},
    "bias": {"bias": "all", "target_modules": ["q_proj"]},
    "lora_only": {"bias": "lora_only", "target_modules": ["q_proj"]},
}
REFUSED = {(Initial, "bias"), (Initial, "lora_only"), (EMA, "bias"), (EMA, "lora_only"), (EMA, "dora")}
NOTHING_YET = {"plain", "head", "norms", "tokens"}
"""Those that a test also begins with second factors of 0, which alone say that LoRA does nothing."""


def save_adapter(base: Path, folder: Path, seed: int = 0, only_aside: bool = False, **settings: Any) -> Path:
    """An adapter that changes the base; ``only_aside``: but for its LoRA, which is fresh."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not (only_aside and "lora_" in name):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), attention_bias=True)


def self_taught(base: Path, adapter: Path, weights: TeacherWeights, other: Path) -> Any:
    """A student that starts from a saved adapter, with a self-teacher, and another one to learn from."""
    return make_module(
        Pretrained(str(base), lora=Lora(adapter=str(adapter))),
        {"other": Teacher(Frozen(Pretrained(str(other)))), "self": Teacher(weights)},
        Objective([Term(ReverseKL(), teacher="other"), Term(ReverseKL(), teacher="self", coefficient=1e-9)]),
        optimizer=sgd(1.0),
    )


@pytest.mark.parametrize("weights", [Initial, EMA])
@pytest.mark.parametrize(
    ("kind", "only_aside"), [*((kind, False) for kind in ADAPTERS), *((kind, True) for kind in sorted(NOTHING_YET))]
)
def test_they_begin_as_the_student_and_move_as_they_should(kind, only_aside, weights, base, tiny_teacher, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", only_aside=only_aside, **ADAPTERS[kind])
    if (weights, kind) in REFUSED:
        with pytest.raises(ValueError, match=r"DoRA|bias"):
            self_taught(base, adapter, weights(), tiny_teacher)
        return
    module = self_taught(base, adapter, weights(), tiny_teacher)
    seen = act(module, make_rows(6))
    start = log_softmax(module, "student", seen)
    torch.testing.assert_close(log_softmax(module, "self", seen), start, atol=1e-4, rtol=1e-4)
    trained = {name for name, p in module.student.named_parameters() if p.requires_grad}
    assert trained <= adapter_parameters(module.student, "default").keys()
    assert any("lora_" not in name for name in trained) == (kind in {"head", "norms", "tokens"})

    fit(module, tmp_path / "run", steps=3)
    moved = log_softmax(module, "student", seen) - start
    assert moved.abs().max() > 0.05
    if weights is Initial:
        torch.testing.assert_close(log_softmax(module, "self", seen), start, atol=1e-4, rtol=1e-4)
    else:
        way = log_softmax(module, "self", seen) - start
        assert 0 < float((way * moved).sum() / moved.square().sum()) < 0.2, "three steps at rate 0.01"


@pytest.mark.parametrize("kind", ["lora_bias", "head", "tokens", "rank_pattern"])
def test_an_average_over_other_adapters_is_in_the_checkpoint(kind, base, tiny_teacher, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    module = self_taught(base, adapter, EMA(0.5), tiny_teacher)
    fit(module, tmp_path / "run", steps=2).save_checkpoint(tmp_path / "last.ckpt")
    again = self_taught(base, adapter, EMA(0.5), tiny_teacher)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    again.load_state_dict(state, strict=False)
    seen = act(module, make_rows(6))
    for name in ("student", "self"):
        assert torch.equal(log_softmax(again, name, seen), log_softmax(module, name, seen))
    assert not any("base_layer" in name or "embed_tokens.original" in name for name in state)


def test_what_is_refused_is_named(base, tiny_teacher, tmp_path):
    adapter = save_adapter(base, tmp_path / "adapter", **ADAPTERS["bias"])
    with pytest.raises(ValueError, match=r"model\.teachers\.self: .* the student also trains .*bias"):
        self_taught(base, adapter, Initial(), tiny_teacher)
    assert self_taught(base, adapter, Live(), tiny_teacher).policies["self"], "nothing has to be switched"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_average_of_16_bits_moves(dtype, base):
    """To the nearest number an update of rate 0.01 would round away, and the teacher be `Initial` for ever."""
    ema = EMA(0.01)
    module = make_module(Pretrained(str(base), dtype=dtype), {"teacher": Teacher(ema)})
    copied = [p.double() for p in ema.state.parameters()]
    with torch.no_grad():
        for p in module.student.parameters():
            p.mul_(1.01)
    goal = [p.detach().double() for p in module.student.parameters()]
    for step in range(1, 201):
        ema.update(step)
    now = [p.double() for p in ema.state.parameters()]
    way = sum(float(((b - a) * (g - a)).sum()) for a, b, g in zip(copied, now, goal, strict=True))
    whole = sum(float((g - a).square().sum()) for a, g in zip(copied, goal, strict=True))
    assert way / whole == pytest.approx(1 - 0.99**200, abs=0.05)
    assert {p.dtype for p in ema.state.parameters()} == {getattr(torch, dtype)}


def test_averages_of_16_bits_draw_the_same_at_the_same_step(base):
    found = []
    for steps in ((1, 2, 3), (1, 2, 3), (4, 5, 6)):
        ema = EMA(0.05)
        module = make_module(Pretrained(str(base), dtype="bfloat16"), {"teacher": Teacher(ema)})
        with torch.no_grad():
            for p in module.student.parameters():
                p.mul_(1.1)
        for step in steps:
            ema.update(step)
        found.append([p.clone() for p in ema.state.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_at_random_is_right_on_average_and_leaves_what_fits(dtype):
    draw = torch.Generator().manual_seed(0)
    fits = torch.randn(1000).to(dtype).float()
    assert torch.equal(rounded_at_random(fits, dtype, draw), fits.to(dtype))
    value = torch.tensor([1 / 3, -1 / 3, 1e-3, -12.34])
    drawn = rounded_at_random(value.repeat(20_000, 1), dtype, draw).double()
    assert (drawn.mean(0) / value.double() - 1).abs().max() < 1e-4
    assert all(len(column.unique()) == 2 for column in drawn.T), "its two neighbors"


@pytest.mark.parametrize(("template", "warned"), [("{{ prompt }}", True), ("{{ solution }}{{ prompt }}", False)])
def test_a_view_that_shows_nothing_more_is_warned_about(tiny_student, tmp_path, template, warned, recwarn):
    module = make_module(tiny_student, {"teacher": Teacher(Live(), PromptView(template))})
    warn_of_idle_views(module, make_rows(2)[1])
    assert any("shows the first row as the student sees it" in str(w.message) for w in recwarn) == warned


def test_a_view_that_waits_for_what_is_found_out_is_not_warned_about(tiny_student, recwarn):
    view = FirstOf([PromptView("{{ number }}{{ prompt }}"), PromptView("{{ prompt }}")])
    module = make_module(tiny_student, {"teacher": Teacher(Live(), view)}, notes={"note": Numbered()})
    warn_of_idle_views(module, make_rows(2)[1])
    assert not any("as the student sees it" in str(w.message) for w in recwarn)
