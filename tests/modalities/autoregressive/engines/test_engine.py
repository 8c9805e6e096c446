"""The default rollout engine against `generate`: the same tokens, with less work."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from PIL import Image

from opd_lightning.modalities.autoregressive import DecodeLoop, Generate, RolloutEngine
from opd_lightning.modalities.autoregressive.engines.decode_loop import compact_rows, projection
from opd_lightning.modalities.autoregressive.engines.engine import Prompts
from opd_lightning.modalities.autoregressive.engines.layers import PackedDecoder
from opd_lightning.modalities.autoregressive.models import bare
from opd_lightning.modalities.text import TextDistillation
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.rollout_settings import Rollout
from tests.tiny import act, make_module, make_rows, no_teacher

SHAPES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 1.5, "horizon": 25},
    {"temperature": 1.3, "top_p": 0.9, "top_k": 5, "min_p": 0.02},
    {"horizon": 1},
]


def same(one, other) -> None:
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(one.actions, other.actions)
    assert torch.equal(one.stopped, other.stopped)
    assert (one.behavior_log_probs - other.behavior_log_probs).abs().max() < 1e-4


def by(module: Any, engine: RolloutEngine, rows: list[Any], **settings: Any):
    module.engine = engine
    return act(module, rows, **settings)


class Watched:
    """The shapes of the token ids that a model's body is called with."""

    def __init__(self, module: Any, monkeypatch: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        body = bare(module.policies["student"].model).base_model
        forward = body.forward
        monkeypatch.setattr(body, "forward", lambda *a, **k: self._note(k) or forward(*a, **k))
        body.forward.__signature__ = inspect.signature(forward)  # by which the engine knows what it serves

    def _note(self, given: dict[str, Any]) -> None:
        self.shapes.append(tuple(given["input_ids"].shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_are_those_of_generate(any_world, shape):
    module, rows = any_world.alone(), any_world.make_rows(8)
    rows = [rows[i] for i in (0, 1, 2, 3, 0, 5, 6, 0, 3)]  # some prompts several times, not side by side
    same(by(module, DecodeLoop(), rows, **shape), by(module, Generate(), rows, **shape))


def test_tokens_are_those_of_generate_with_adapters(tiny_student):
    module = make_module(Pretrained(str(tiny_student), lora=Lora(r=2)), {}, no_teacher())
    same(by(module, DecodeLoop(), make_rows(6)), by(module, Generate(), make_rows(6)))


def test_every_prompt_is_read_once_and_ended_rows_leave(tiny_student, monkeypatch):
    module = make_module(tiny_student, {}, no_teacher())
    watched = Watched(module, monkeypatch)
    rows = make_rows(4)
    rolled = by(module, DecodeLoop(), [row for row in rows for _ in range(6)], temperature=1.5, horizon=20)
    width = rolled.observation["input_ids"].shape[1]
    assert watched.shapes[0] == (4, width)
    lengths = rolled.mask.sum(1)
    assert int(lengths.min()) < int(lengths.max())
    later = [int((lengths > step).sum()) for step in range(1, int(lengths.max()))]
    assert watched.shapes[1:] == [(rows_left, 1) for rows_left in later]


def test_what_it_does_not_serve_is_written_by_generate(saved, monkeypatch):
    module = make_module(saved(architecture="gemma3"), {}, no_teacher())
    policy = module.policies["student"]
    assert "keys and values of every token" in str(DecodeLoop().refusal(policy))
    assert "generate (layers that keep" in dict(module.audit_rows())["rollouts by"]["student"]
    monkeypatch.setattr(Generate, "write", lambda self, *args: pytest.fail("as it should"))
    with pytest.raises(pytest.fail.Exception, match="as it should"):
        act(module, make_rows(2))


def test_an_engine_is_an_argument_of_the_setting(tiny_student):
    class Ones(RolloutEngine):
        def write(self, policy, head, prompts, rollout, seeds, eos, pad):
            one = torch.tensor(eos[:1]).expand(len(seeds), 1)
            return one, torch.zeros(one.shape)

    module = make_module(tiny_student, {}, no_teacher(), setting=TextDistillation, engine=Ones())
    assert act(module, make_rows(3)).stopped.all()
    assert dict(module.audit_rows())["rollouts by"] == {"student": "Ones"}
    assert isinstance(make_module(tiny_student, {}, no_teacher()).engine, DecodeLoop)


def test_equal_tokens_with_other_images_are_other_prompts():
    ids = torch.tensor([[1, 2], [1, 2], [1, 3], [1, 2]])
    examples = [{"image": "red"}, {"image": "blue"}, {"image": "red"}, {"image": "red"}]
    prompts = Prompts({"input_ids": ids}, examples, lambda e: {}, lambda e: e["image"])
    assert prompts.distinct == ([0, 1, 2], [0, 1, 2, 0])
    alike = Prompts({"input_ids": ids}, examples, lambda e: {}, lambda e: None)
    assert alike.distinct == ([0, 2], [0, 0, 1, 0])


def test_images_decide_what_is_the_same_prompt(any_world):
    module, rows = any_world.alone(), any_world.make_rows(2)
    if "image" not in rows[0] and "images" not in rows[0]:
        pytest.skip("no images")
    other = copy.copy(rows[0])
    key = "image" if "image" in other else "images"
    size = (other[key] if key == "image" else other[key][0]).size
    blank = Image.new("RGB", size, (5, 99, 200))
    other[key] = blank if key == "image" else [blank] * len(other[key])
    assert module.cache_key(rows[0]) == module.cache_key(copy.deepcopy(rows[0])) != module.cache_key(other)
    mixed = [rows[0], other, rows[0], other]
    same(by(module, DecodeLoop(), mixed), by(module, Generate(), mixed))


def test_the_last_rows_fill_the_gaps():
    for case in range(200):
        going = torch.rand(12, generator=torch.Generator().manual_seed(case)) < 0.6
        left = int(going.sum())
        order = compact_rows(going, left)
        assert sorted(order.tolist()) == going.nonzero().squeeze(1).tolist()
        assert (order >= torch.arange(left)).all()
        assert int((order != torch.arange(left)).sum()) <= 12 - left


def test_the_packed_head_is_the_head(any_world):
    module = any_world.alone()
    head = module.head(module.policies["student"])
    hidden = torch.randn(9, head.module.in_features)
    with torch.no_grad():
        project = projection(head, hidden, 9)
        for rows in (9, 4, 1):
            assert torch.allclose(project(hidden[:rows]), head(hidden[:rows]), atol=1e-5)


def test_a_rollout_does_not_depend_on_the_one_before(any_world):
    module, rows = any_world.alone(), any_world.make_rows(8)
    once = by(module, DecodeLoop(), rows)
    by(module, DecodeLoop(), rows[::-1][:3], temperature=2.0)
    again = by(module, DecodeLoop(), rows)
    assert torch.equal(once.actions, again.actions)
    assert torch.equal(once.behavior_log_probs, again.behavior_log_probs)


def test_the_model_keeps_its_mode(tiny_student):
    module = make_module(tiny_student, {}, no_teacher(), rollout=Rollout(horizon=3))
    for mode in (True, False):
        module.student.train(mode)
        act(module, make_rows(2))
        assert module.student.training is mode


def test_where_packed_layers_decode(any_world):
    """In every world but Gemma's, whose layers are of another kind: so the tests here are theirs, too."""
    model = bare(any_world.alone().policies["student"].model)
    expected = "layers of another kind" if "gemma" in model.config.model_type else None
    assert PackedDecoder.refusal(model) == expected


def test_the_models_own_forward_pass_writes_the_same(any_world):
    module, rows = any_world.alone(), any_world.make_rows(3) * 2
    same(by(module, DecodeLoop(packed=False), rows), by(module, DecodeLoop(), rows))
