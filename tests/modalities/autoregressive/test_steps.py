"""What a policy says at every visited state: padding, views, replay, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.modalities.autoregressive.models import head_at
from opd_lightning.modalities.autoregressive.passes import passes
from opd_lightning.objective import ForwardKL, Objective, ReverseKL, Term
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Frozen, Initial, Live, Teacher
from tests.tiny import act, log_softmax, make_module, make_rows, no_teacher, teacher_forced

PRIVILEGED = PromptView("{{ solution }}?{{ prompt }}")


def frozen(path, **settings) -> dict[str, Teacher]:
    return {"teacher": Teacher(Frozen(Pretrained(str(path))), **settings)}


def test_a_batch_says_what_each_row_says_alone(student):
    """Prompts padded on the left, completions on the right."""
    module = make_module(student, {}, no_teacher())
    rolled = act(module, make_rows(8))
    together = log_softmax(module, "student", rolled)
    for i, alone in enumerate(rolled.split(1)):
        steps = int(alone.mask.sum())
        prompt = alone.observation["attention_mask"].bool()
        text = torch.cat([alone.observation["input_ids"][prompt], alone.actions[0, :steps]])
        model = module.policies["student"].model
        with torch.no_grad():
            plain = model(input_ids=text[None]).logits[0, -steps - 1 : -1, : module.vocabulary].log_softmax(-1)
        assert (log_softmax(module, "student", alone)[0, :steps] - plain).abs().max() < 1e-4
        assert (together[i, :steps] - plain).abs().max() < 1e-4


def test_many_passes_say_and_learn_what_one_does(student, teacher):
    module = make_module(student, frozen(teacher, view=PRIVILEGED))
    rolled = act(module, make_rows(8))
    everything = rolled.mask
    calls: list[int] = []
    module.student.base_model.register_forward_hook(lambda *_: calls.append(1))

    def found(most: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        module.pass_tokens = most
        calls.clear()
        streams = module.streams.query_all(module.objective.teachers(), rolled)
        said = module.distribution(module.policies["student"], rolled)
        loss, _ = module.objective(said, streams, rolled)
        module.zero_grad()
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in module.student.parameters()]

    @given(reach=st.lists(st.integers(0, 10), min_size=8, max_size=8).filter(any), most=st.integers(1, 30))
    @settings(max_examples=12, deadline=None)
    def check(reach, most):
        rolled.mask = everything & (torch.arange(everything.shape[1]) < torch.tensor(reach)[:, None])
        loss, gradients = found(most)
        assert len(calls) > 1
        expected_loss, expected = found(10**6)
        assert len(calls) == 1
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-4)

    check()


@given(
    length=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    most=st.one_of(st.integers(1, 150), st.just(math.inf)),
    cost=st.integers(0, 50),
)
@settings(max_examples=100, deadline=None)
def test_no_cut_into_passes_is_cheaper(length, most, cost):
    def tokens(rows: list[int]) -> int:
        return len(rows) * max(length[row] for row in rows)

    def cuts(rows: list[int]) -> Iterator[list[list[int]]]:
        if not rows:
            yield []
            return
        for rest in cuts(rows[1:]):
            yield [[rows[0]], *rest]
            for i, one in enumerate(rest):
                yield [*rest[:i], [rows[0], *one], *rest[i + 1 :]]

    def price(cut: list[list[int]]) -> int:
        return sum(tokens(rows) + cost for rows in cut)

    def allowed(cut: list[list[int]]) -> bool:
        return all(len(rows) == 1 or tokens(rows) <= most for rows in cut)

    found = [rows.tolist() for rows in passes(torch.tensor(length), most, cost)]
    assert sorted(row for rows in found for row in rows) == list(range(len(length)))
    assert allowed(found)
    assert price(found) == min(price(cut) for cut in cuts(list(range(len(length)))) if allowed(cut))


def test_rows_all_alike_are_one_pass_within_the_limit():
    alike = torch.full((32,), 158)
    assert [len(rows) for rows in passes(alike, math.inf, 1)] == [32]
    assert [len(rows) for rows in passes(alike, 1280, 128)] == [8] * 4


def test_a_batch_is_as_wide_as_its_longest_row(student):
    """Not as wide as the longest prompt and the longest completion together."""
    module = make_module(student, {}, no_teacher(), pass_tokens=10**6)
    rolled = act(module, [{"prompt": "1+1="}, {"prompt": "1" * 30 + "="}])
    rolled.mask &= torch.arange(rolled.mask.shape[1]) < torch.tensor([10, 1])[:, None]
    length = rolled.observation["attention_mask"].sum(1) + rolled.length
    widths = []
    module.student.base_model.register_forward_pre_hook(
        lambda _, inputs, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    module.distribution(module.policies["student"], rolled)
    assert widths == [int(length.max())]


def test_a_limit_below_one_token_is_refused():
    with pytest.raises(ValueError, match=r"model\.pass_tokens must be >= 1, got 0"):
        make_module("nowhere", {}, no_teacher(), load=False, pass_tokens=0)


def test_a_view_is_aligned_at_the_start_of_the_response(student, teacher):
    """Its prompt has another length in every row, and the same completion."""
    module = make_module(student, frozen(teacher, view=PRIVILEGED))
    rolled = act(module, make_rows(8))
    stream = module.streams.query("teacher", rolled)
    assert stream.available.tolist() == [bool(example["solution"]) for example in rolled.examples]
    said = stream.distribution.head(stream.distribution.hidden).log_softmax(-1)
    model, tokenizer = module.policies["teacher"].model, module.tokenizer()
    for i, example in enumerate(rolled.examples):
        shown = (PRIVILEGED(example) or example)["prompt"]
        steps = int(rolled.mask[i].sum())
        text = torch.cat([torch.tensor(tokenizer(shown)["input_ids"]), rolled.actions[i, :steps]])
        with torch.no_grad():
            plain = model(input_ids=text[None]).logits[0, -steps - 1 : -1, : module.vocabulary].log_softmax(-1)
        assert (said[i, :steps] - plain).abs().max() < 1e-4
    assert not torch.allclose(said, log_softmax(module, "teacher", rolled), atol=1e-2), "the view changes nothing?"


@pytest.mark.parametrize("weights", ["frozen", "initial", "live", "ema"])
@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["full", "lora"])
def test_the_student_itself_without_a_view_is_at_no_distance(any_world, weights, lora):
    made = {
        "frozen": Frozen(Pretrained(str(any_world.student))),
        "initial": Initial(),
        "live": Live(),
        "ema": EMA(0.3),
    }[weights]
    objective = Objective([Term(ReverseKL()), Term(ForwardKL())])
    module = any_world.module({"teacher": Teacher(made)}, objective, lora=lora)
    rolled = act(module, any_world.make_rows(8))
    streams = module.streams.query_all(module.objective.teachers(), rolled)
    with torch.no_grad():
        loss, averages = objective(module.distribution(module.policies["student"], rolled), streams, rolled)
    found = averages.compute()
    assert found["loss/ReverseKL"] == found["loss/ForwardKL"] == float(loss) == 0.0


def test_a_teacher_acts_on_its_view_and_the_student_learns_on_its_own_prompt(any_world):
    module = any_world.module(
        frozen(any_world.teacher, view=any_world.view),
        rollout=Rollout(batch_size=8, horizon=10, behavior={"teacher": 1.0}),
    )
    rows = any_world.make_rows(8)
    rolled = act(module, rows, "teacher")
    assert torch.equal(rolled.observation["input_ids"], module.collate(rows, module.policies["student"])["input_ids"])
    assert rolled.examples == rows
    shown = [any_world.view(row) or row for row in rows]
    seen = teacher_forced(module, "teacher", rolled, shown)
    assert (seen - rolled.behavior_log_probs).abs().max() < 1e-4
    assert (teacher_forced(module, "teacher", rolled) - rolled.behavior_log_probs).abs().max() > 1e-2


def test_replay_ends_with_the_stop_token_and_is_cut_at_the_horizon(world):
    rows = world.make_rows(4)
    whole, cut = (
        world.alone(rollout=Rollout(horizon=horizon, behavior={"dataset": 1.0})).act("dataset", rows, [0] * 4)
        for horizon in (60, 4)
    )
    eos = world.alone().eos
    assert bool(whole.stopped.all())
    for i in range(4):
        long, short = whole.actions[i][whole.mask[i]].tolist(), cut.actions[i][cut.mask[i]].tolist()
        assert long[-1] in eos
        assert not set(long[:-1]) & set(eos)
        assert short == long[:4]
        assert bool(cut.stopped[i]) == (len(long) <= 4)
    assert whole.behavior_log_probs.isnan().all()


def test_an_empty_completion_is_a_stop_token(tiny_student):
    module = make_module(tiny_student, {}, no_teacher(), rollout=Rollout(horizon=4, behavior={"dataset": 1.0}))
    rows = [{"prompt": "1+1=", "completion": text} for text in ("2", "123", "1234", "")]
    rolled = module.act("dataset", rows, [0] * 4)
    known = [module.tokenizer().decode(a[m]) for a, m in zip(rolled.actions, rolled.mask, strict=True)]
    assert known == ["2<eos>", "123<eos>", "1234", "<eos>"]


# -- refusals (rule 8) --------------------------------------------------------------------------------------------


def prompt_length(world, row) -> int:
    module = world.alone()
    return len(module.prompt_ids(row, module.policies["student"]))


def test_a_long_prompt_is_refused_with_its_length_and_the_limit(world):
    row = world.make_rows(1)[0]
    length = prompt_length(world, row)
    assert world.alone(rollout=Rollout(horizon=8, max_prompt_length=length)).refusal(row) is None
    reason = world.alone(rollout=Rollout(horizon=8, max_prompt_length=length - 1)).refusal(row)
    assert reason == f"the prompt has {length} tokens, rollout.max_prompt_length is {length - 1}"


def test_a_teachers_view_has_its_own_limit(world):
    row = world.make_rows(2)[1]
    seen = world.view(row)
    length = prompt_length(world, seen)
    for limit in (length, length - 1):
        module = world.module(
            frozen(world.teacher, view=world.view, max_prompt_length=limit), rollout=Rollout(horizon=8)
        )
        wanted = f"the teacher's prompt has {length} tokens, the limit of model.teachers.teacher is {limit}"
        assert module.refusal(row) == (None if limit == length else wanted)


def test_prompt_and_horizon_must_fit_the_context(saved):
    short = saved(max_position_embeddings=16)
    module = make_module(short, {}, no_teacher(), rollout=Rollout(horizon=10))
    assert module.refusal({"prompt": "12+34="}) is None
    reason = module.refusal({"prompt": "12+345="})
    assert reason is not None
    assert reason.startswith("the prompt's 7 tokens and rollout.horizon 10 exceed the context of 16: ")


def test_a_teachers_prompt_has_its_own_limit(saved, tiny_student):
    view = PromptView("{{ solution }}{{ prompt }}")
    module = make_module(
        tiny_student,
        frozen(tiny_student, view=view, max_prompt_length=12),
        rollout=Rollout(horizon=8, max_prompt_length=4),
    )
    assert module.refusal({"prompt": "1+1=", "solution": "12345678"}) is None
    assert module.refusal({"prompt": "1+1=", "solution": ""}) is None, "no view, nothing to be too long"
    reason = module.refusal({"prompt": "1+1=", "solution": "123456789"})
    assert reason == "the teacher's prompt has 13 tokens, the limit of model.teachers.teacher is 12"

    module = make_module(tiny_student, frozen(saved(max_position_embeddings=16), view=view), rollout=Rollout(horizon=8))
    assert module.refusal({"prompt": "1+1=", "solution": "1234"}) is None
    reason = module.refusal({"prompt": "1+1=", "solution": "12345"})
    assert reason == "the teacher's prompt has 9 tokens, the limit of model.teachers.teacher is 8"


@pytest.mark.parametrize("settings", [{}, {"max_prompt_length": 100, "view": PRIVILEGED}], ids=["plain", "own limit"])
def test_prompt_and_horizon_must_fit_the_teachers_context(saved, tiny_student, settings):
    """Also where it sees the student's prompt, and where its own limit is beyond what it can hold."""
    module = make_module(
        tiny_student, frozen(saved(max_position_embeddings=16), **settings), rollout=Rollout(horizon=10)
    )
    assert module.refusal({"prompt": "123", "solution": "1"}) is None
    reason = module.refusal({"prompt": "1234567", "solution": "1"})
    assert reason is not None
    assert reason.endswith("the limit of model.teachers.teacher is 6")


def test_a_teachers_limit_holds_without_a_view_too(tiny_student):
    module = make_module(tiny_student, frozen(tiny_student, max_prompt_length=5))
    assert module.refusal({"prompt": "1+11="}) is None
    reason = module.refusal({"prompt": "11+11="})
    assert reason == "the teacher's prompt has 6 tokens, the limit of model.teachers.teacher is 5"


def test_the_head_of_a_teacher_elsewhere_is_copied_once(tiny_student, tiny_teacher):
    """Its hidden states come to the student's device; so must what makes logits of them."""
    module = make_module(tiny_student, tiny_teacher)
    policy, elsewhere = module.policies["teacher"], torch.device("meta")
    own, copies = module.head(policy), module._heads
    here = head_at(torch.device("cpu"), own, policy.name, copies)
    assert here.module is policy.model.get_output_embeddings()
    there = head_at(elsewhere, own, policy.name, copies)
    assert there.module.weight.device == elsewhere
    assert head_at(elsewhere, own, policy.name, copies).module is there.module
    assert here.module.weight.device.type == "cpu"
    assert (there.vocabulary, there.scale) == (here.vocabulary, here.scale)
    assert not any("heads" in name for name in module.state_dict())
