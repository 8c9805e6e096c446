"""Turns of recorded trajectories: what is trained of them, and going on from some of them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning import PromptData, Rollout
from opd_lightning.trajectory import Trajectories
from tests.modalities.autoregressive.test_rendering import (
    ENDS,
    FORGETFUL,
    GLM,
    MISTRAL3,
    PHI3,
    QWEN3,
    R1,
    renderer,
    stops,
)
from tests.objective.reference import examples
from tests.test_trajectory import make
from tests.tiny import (
    CHAT_TEMPLATE,
    act,
    chat_tokenizer,
    fit,
    make_module,
    make_trainer,
    no_teacher,
    save_model,
    teacher_forced,
)

# every template of the tiny models, and the same as the models of these names have them
TEMPLATES = {"tiny": (CHAT_TEMPLATE, "<|im_end|>"), **ENDS, "Phi 3": (PHI3, "<|end|>"), "GLM": (GLM, "<|user|>")}
TEMPLATES["Mistral 3"] = (MISTRAL3, "</s>")
del TEMPLATES["DeepSeek R1"]  # whose prompts begin a thought that no conversation has: refused below
ALTERNATING = {"Gemma", "Mistral", "GLM"}  # they know users and assistants alone

texts = st.text("abc 42,?\n", min_size=1, max_size=12).map(str.strip).filter(len)


@st.composite
def conversations(draw: Any, observers: tuple[str, ...], most: int = 4) -> list[dict[str, str]]:
    """A question, and turns of the assistant with an observation between each two."""
    messages = [{"role": "user", "content": draw(texts)}]
    for number in range(draw(st.integers(1, most))):
        if number:
            messages.append({"role": draw(st.sampled_from(observers)), "content": draw(texts)})
        messages.append({"role": "assistant", "content": draw(texts)})
    return messages


def cut(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {"prompt": messages[:1], "completion": messages[1:]}


def spelled(made: Any, ids: list[int]) -> str:
    return "".join(made.tokenizer.decode(ids).split())


@pytest.mark.parametrize("name", TEMPLATES)
@examples(25)
@given(data=st.data())
def test_of_a_recorded_conversation_the_assistant_s_steps_are_trained_and_no_other(name, data):
    template, end = TEMPLATES[name]
    made = renderer(template)
    messages = data.draw(conversations(("user",) if name in ALTERNATING else ("user", "tool")))
    ids, written = made.completion(cut(messages), stops(made, end))
    turns, turn = [], []
    for token, own in zip(ids, written, strict=True):
        turn += [token] * own
        if turn and not own:
            turns.append(turn)
            turn = []
    turns.append(turn)
    assert len(turns) == len(messages) // 2
    for one, message in zip(turns, messages[1::2], strict=True):
        text = spelled(made, one).removesuffix(end).removesuffix("</s>").replace("<think></think>", "")
        assert text == "".join(message["content"].split())
    assert ids[-1] in stops(made, end)
    observed = spelled(made, [token for token, own in zip(ids, written, strict=True) if not own])
    for message in messages[2::2]:
        assert "".join(message["content"].split()) in observed


def test_a_column_messages_is_prompt_and_completion(tmp_path):
    path = tmp_path / "recorded.jsonl"
    system, *rest = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
    answers = [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "t"}]
    last = {"role": "assistant", "content": "b", "ids": [3, 4]}
    rows = [{"messages": [system, *rest, *answers, last]}, {"messages": [system, *rest]}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = PromptData(train=str(path))
    data.setup("fit")
    assert data.train is not None
    assert "messages" not in data.train.column_names
    first, second = ({n: strip(row[n]) for n in ("prompt", "completion")} for row in data.train)
    assert first == {"prompt": [system, *rest], "completion": [*answers, last]}
    assert second == {"prompt": [system, *rest], "completion": None}


def strip(chat: Any) -> Any:
    return None if chat is None else [{k: v for k, v in m.items() if v is not None} for m in chat]


# -- what a template leaves out or writes otherwise -------------------------------------------------------------------

THOUGHT = "<think>\nhm\n</think>\n\nlook"


def rewriting(template: str) -> str:
    return template.replace("{{ m.content }}", "{{ m.content | replace('1', 'one') }}")


@pytest.mark.parametrize(
    ("template", "first", "reason"),
    [
        (QWEN3, {"content": THOUGHT}, r"of turn 1 it writes 'look<\|im_end\|>.*, and the row has '<think>"),
        (FORGETFUL, {"content": THOUGHT}, "of turn 1 it writes .*look.*, and the row has '<think>"),
        (R1, {"content": "add 1"}, "before turn 1 it writes 'add 1.*, where '<think>.* was read"),
        (rewriting(CHAT_TEMPLATE), {"content": "add 1"}, "of turn 1 it writes 'add one.*, and the row has 'add 1'"),
    ],
)
def test_a_template_that_drops_or_rewrites_an_earlier_turn_is_refused_with_the_place(template, first, reason):
    made = renderer(template)
    later = [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "done"}]
    row = {"prompt": "q", "completion": [{"role": "assistant", **first}, *later]}
    with pytest.raises(ValueError, match=rf"(?s)does not write the whole completion behind the prompt: {reason}"):
        made.completion(row, stops(made, "<|im_end|>"))


def test_ids_that_were_sampled_stand_in_the_conversation_unchanged():
    made = renderer(CHAT_TEMPLATE)
    end = made.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = [*(i for c in "the cat" for i in made.tokenizer(c, add_special_tokens=False)["input_ids"]), end]
    assert ids[:-1] != made.tokenizer("the cat", add_special_tokens=False)["input_ids"], "another way to spell it"
    answer = {"role": "assistant", "content": "done"}
    row = {"prompt": "q", "completion": [{"role": "assistant", "ids": ids}, {"role": "tool", "content": "4"}, answer]}
    given_ids, written = made.completion(row, stops(made, "<|im_end|>"))
    assert given_ids[: len(ids)] == ids
    assert written[: len(ids) + 1] == [True] * len(ids) + [False]
    # a turn that was cut has no end of its own, and what ends it is not trained
    row["completion"][0] = {"role": "assistant", "ids": ids[:-1]}
    cut_ids, cut_written = made.completion(row, stops(made, "<|im_end|>"))
    assert cut_ids == given_ids
    assert not cut_written[len(ids) - 1]
    trimming = renderer(CHAT_TEMPLATE.replace("m.content", "m.content | trim"))
    row["completion"][0] = {"role": "assistant", "ids": [*ids[:-1], *made.tokenizer(" \n")["input_ids"][1:], end]}
    reason = r"the ids of turn 1 of the completion write 'the cat \\n', and there the chat template of .* 'the cat':"
    with pytest.raises(ValueError, match=reason):
        trimming.completion(row, stops(trimming, "<|im_end|>"))


def test_the_run_is_refused_with_row_and_turn(tmp_path):
    folder = save_model(tmp_path / "model", tokenizer=chat_tokenizer(FORGETFUL))
    path = tmp_path / "recorded.jsonl"
    plain = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    thinking = [plain[0], {"role": "assistant", "content": "<think>b</think>c"}, plain[0], plain[1]]
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in (plain, thinking)), encoding="utf-8")
    module = make_module(folder, {}, no_teacher(), rollout=Rollout(batch_size=1, behavior={"dataset": 1.0}))
    with pytest.raises(ValueError, match=r"recorded.jsonl, row 2: the chat template does not .*: of turn 1 it writes"):
        fit_data(module, tmp_path, path)


def fit_data(module: Any, folder: Any, path: Any) -> None:
    make_trainer(folder).fit(module, datamodule=PromptData(train=str(path)))


# -- going on from recorded turns ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[CHAT_TEMPLATE, MISTRAL3])
def recorder(request, tmp_path_factory) -> Any:
    folder = save_model(tmp_path_factory.mktemp("model"), tokenizer=chat_tokenizer(request.param))
    return make_module(folder, {}, no_teacher(), rollout=Rollout(batch_size=2, horizon=100))


@examples(10)
@given(data=st.data(), turns=st.integers(0, 4), seed=st.integers(0, 99))
def test_a_policy_goes_on_from_recorded_turns_and_nothing_else_is_trained(recorder, data, turns, seed):
    chats = data.draw(st.lists(conversations(("user", "tool")), min_size=1, max_size=4))
    rows = [cut(messages) for messages in chats]
    rows[-1]["completion"] = None if turns % 2 else rows[-1]["completion"]
    acted = act(recorder, rows, seed=seed, prefix_turns=turns, horizon=190)
    student = recorder.policies["student"]
    for i, row in enumerate(rows):
        ids, written = recorder.renderer(student).completion(row, recorder.eos) if row["completion"] else ([], [False])
        starts = [j for j, own in enumerate(written) if own and not (j and written[j - 1])]
        begin = starts[min(turns, len(starts) - 1)] if turns and row["completion"] else 0
        assert acted.actions[i, :begin].tolist() == ids[:begin], "what was recorded is read as it is"
        assert not acted.mask[i, :begin].any(), "neither prefix nor observation is trained"
        extent = int(acted.extent[i])
        assert acted.mask[i, begin:extent].all()
        assert extent > begin
        assert not acted.mask[i, extent:].any()
        if turns:
            assert acted.channels["turn"][i, begin] == (min(turns, len(starts) - 1) if row["completion"] else 0)
    close_to_replay(recorder, acted)


def close_to_replay(module: Any, acted: Trajectories) -> None:
    apart = (teacher_forced(module, "student", acted) - acted.behavior_log_probs)[acted.mask].abs()
    assert float(apart.max()) < 1e-4


def test_every_setting_goes_on_from_what_was_begun(world):
    module = world.alone(rollout=Rollout(horizon=6))
    rows = [row | {"completion": None} for row in world.make_rows(4)]
    whole = act(module, rows, horizon=8)
    steps = torch.tensor([0, 1, 3, 2])
    branches = module.actor.branch("student", whole, torch.arange(4), steps, horizon=4, seeds=[1, 2, 3, 4])
    for i, held in enumerate(torch.minimum(steps, whole.extent).tolist()):
        assert branches.actions[i, :held].tolist() == whole.actions[i, :held].tolist()
        assert not branches.mask[i, :held].any()
        assert branches.mask[i].any()
    close_to_replay(module, branches)
    assert branches.channels.keys() == whole.channels.keys()


def test_prefix_turns_are_trained(recorder, tmp_path):
    rows = [
        cut([{"role": "user", "content": f"{i}?"}, *CALLED, {"role": "assistant", "content": f"{i}"}]) for i in range(8)
    ]
    recorder.rollout = Rollout(batch_size=4, horizon=60, prefix_turns=1)
    fit(recorder, tmp_path, rows, steps=2)
    recorder.rollout = Rollout(batch_size=2, horizon=100)


CALLED = [{"role": "assistant", "content": "add"}, {"role": "tool", "content": "4"}]


def test_a_recording_that_leaves_no_room_is_refused(recorder):
    row = cut([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 90}, *CALLED[::-1]])
    before, recorder.rollout = recorder.rollout, Rollout(horizon=100, prefix_turns=1)
    reason = r"what rollout.prefix_turns=1 goes on from has 1\d\d tokens, and rollout.horizon is 100"
    assert re.match(reason, str(recorder.refusal(row)))
    recorder.rollout = before


def test_settings_without_turns_refuse_them():
    with pytest.raises(ValueError, match=r"rollout\.prefix_turns=2: this setting records no turns to go on from"):
        Rollout(prefix_turns=2).check(set(), set())
    with pytest.raises(ValueError, match=r"rollout\.prefix_turns must be >= 0, got -1"):
        Rollout(prefix_turns=-1)


def test_states_are_branched(recorder):
    rows = [{"prompt": "abc"}, {"prompt": "what is 42, and why?"}]
    acted = act(recorder, rows, horizon=12)
    picked, steps = torch.tensor([0, 0, 1, 1]), torch.tensor([3, 3, 1, 0])
    branches = recorder.actor.branch("student", acted, picked, steps, horizon=5, seeds=[7, 8, 9, 9])
    for i, (row, step) in enumerate(zip(picked, steps, strict=True)):
        step = min(int(step), int(acted.extent[row]))
        assert branches.actions[i, :step].tolist() == acted.actions[row, :step].tolist()
        assert not branches.mask[i, :step].any()
        assert 1 <= int(branches.mask[i].sum()) <= 5
        assert int(branches.extent[i]) <= step + 5
    assert branches.actions[0].tolist() != branches.actions[1].tolist()
    close_to_replay(recorder, branches)


# -- joining ---------------------------------------------------------------------------------------------------------


@examples(30)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_steps_follow_without_a_gap(lengths, seed):
    begun, later = make([a for a, _ in lengths], seed=seed), make([b for _, b in lengths], seed=seed + 1)
    joined = begun.followed_by(later)
    assert joined.length.tolist() == later.length.tolist()
    for i, (held, more) in enumerate(lengths):
        expected = [*begun.actions[i, :held].tolist(), *later.actions[i, :more].tolist()]
        assert joined.actions[i, : held + more].tolist() == expected
        assert joined.mask[i].tolist()[:held] == [False] * held
        assert joined.mask[i, held : held + more].all()
        assert not joined.mask[i, held + more :].any()
