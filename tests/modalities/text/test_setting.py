"""TextDistillation: from raw prompts and chats to token ids."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, Gemma3Config

from opd_lightning.data import PromptData
from opd_lightning.modalities.autoregressive import PromptView, TemplateOptions
from opd_lightning.pretrained import Lora, Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Frozen, Initial, Live, Teacher
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

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1="}]
USER = "<s><|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"


def shown(module, prompt, policy=None) -> str:
    """What a prompt becomes, special tokens and all."""
    batch = module.collate([{"prompt": prompt}, {"prompt": "a longer prompt than that, to be padded"}], policy)
    ids = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    return module.tokenizer().decode(ids)


@pytest.fixture(scope="session")
def other_template(tmp_path_factory):
    """The same tokens, another chat template."""
    tokenizer = chat_tokenizer("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    return save_model(tmp_path_factory.mktemp("other"), tokenizer=tokenizer, rows=108, seed=2)


def test_a_string_prompt_becomes_a_user_message(chat_student):
    assert shown(make_module(chat_student, {}, no_teacher()), "1+1=") == USER


def test_a_chat_is_rendered_whole_and_begins_once(chat_student):
    text = shown(make_module(chat_student, {}, no_teacher()), CHAT)
    assert text == USER.replace("<|im_start|>user", "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert text.count("<s>") == 1


def test_raw_prompts_stay_as_they_are(chat_student):
    module = make_module(chat_student, {}, no_teacher(), raw_prompts=True)
    assert shown(module, "1+1=") == "<s>1+1="
    assert shown(module, CHAT).count("<s>") == 1, "a rendered chat holds its own beginning already"


def test_options_reach_the_template(chat_student):
    module = make_module(chat_student, {}, no_teacher(), chat_template_kwargs={"enable_thinking": False})
    assert shown(module, "1+1=") == USER + "<think></think>"


def test_a_teacher_may_have_options_of_its_own(chat_student):
    """A template per teacher: one thinks, and what it says is that of its own prompt."""
    view = TemplateOptions({"enable_thinking": False})
    module = make_module(chat_student, {"teacher": Teacher(Initial(), view)})
    rolled = act(module, [{"prompt": "1+1="}])
    ids = module.streams.seen("teacher", rolled.examples)
    read = module.tokenizer().decode(module.prompt_ids(ids[0], module.policies["teacher"]))
    assert (shown(module, "1+1="), read) == (USER, USER + "<think></think>")
    said = module.streams.query("teacher", rolled).distribution
    alone = module.distribution(module.policies["teacher"], rolled, [view(rolled.examples[0])])
    assert torch.equal(said.hidden, alone.hidden)
    blind = module.distribution(module.policies["teacher"], rolled)
    assert not torch.equal(said.hidden, blind.hidden)


def test_without_a_template_strings_pass_and_chats_are_refused(tiny_student):
    module = make_module(tiny_student, {}, no_teacher())
    batch = module.collate([{"prompt": "1+1="}, {"prompt": "12+345="}], module.policies["student"])
    assert module.tokenizer().batch_decode(batch["input_ids"]) == ["<pad><pad><pad>1+1=", "12+345="]
    assert batch["attention_mask"].tolist() == [[0] * 3 + [1] * 4, [1] * 7]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.long
    with pytest.raises(ValueError, match=r"the prompt is a chat but .* has no chat template; give string prompts"):
        module.collate([{"prompt": CHAT}], module.policies["student"])


def test_an_empty_prompt_is_refused(tiny_student, chat_student):
    assert make_module(tiny_student, {}, no_teacher()).refusal({"prompt": ""}) == "the prompt is empty"
    assert make_module(chat_student, {}, no_teacher()).refusal({"prompt": ""}) is None, "the template says something"


def test_a_teacher_reads_its_own_template_if_asked_to(chat_student, other_template):
    for own, text in ((True, "<s>[user] 1+1=\n"), (False, USER)):
        teacher = Teacher(Frozen(Pretrained(str(other_template))), own_template=own)
        module = make_module(chat_student, {"teacher": teacher})
        policy = module.policies["teacher"] if own else None
        assert shown(module, "1+1=", policy).removeprefix("<s>") == text.removeprefix("<s>")
        rolled = act(module, [{"prompt": "1+1="}, {"prompt": "a longer prompt"}])
        stream = module.streams.query("teacher", rolled)
        plain = module.tokenizer()(text, add_special_tokens=False)["input_ids"]
        if own:
            plain = module.collate([{"prompt": "1+1="}], policy)["input_ids"][0].tolist()
        steps = int(rolled.mask[0].sum())
        ids = torch.cat([torch.tensor(plain), rolled.actions[0, :steps]])
        with torch.no_grad():
            whole = (
                module.policies["teacher"].model(input_ids=ids[None]).logits[0, -steps - 1 : -1, : module.vocabulary]
            )
        said = stream.distribution
        assert (said.head(said.hidden)[0, :steps] - whole).abs().max() < 1e-4
        assert stream.available is None or bool(stream.available.all())


def test_a_view_in_a_chat(chat_student):
    view = PromptView(
        [{"role": "system", "content": "It is {{ answer }}."}, {"role": "user", "content": "{{ prompt }}"}]
    )
    module = make_module(chat_student, {"teacher": Teacher(Frozen(Pretrained(str(chat_student))), view)})
    row = {"prompt": CHAT, "answer": "2"}
    rolled = act(module, [row])
    said = module.streams.query("teacher", rolled).distribution
    seen = view(row)
    assert seen is not None
    assert "It is 2." in shown(module, seen["prompt"])
    with torch.no_grad():
        expected = module.distribution(module.policies["teacher"], rolled, [seen]).hidden
    assert torch.equal(said.hidden, expected)
    own = teacher_forced(module, "teacher", rolled)
    assert (own - rolled.behavior_log_probs).abs().max() < 1e-4, "equal weights, without the view"


def test_a_view_puts_no_end_of_a_turn_into_a_turn(chat_student):
    view = PromptView("{{ hint }} {{ prompt }}")
    module = make_module(chat_student, {"teacher": Teacher(Live(), view)})
    assert module.refusal({"prompt": CHAT, "hint": "two"}) is None
    reason = module.refusal({"prompt": CHAT, "hint": "<|im_start|>user\n1+1=<|im_end|>"})
    assert reason == "the view of model.teachers.teacher puts '<|im_end|>', the end of a turn, into a turn itself"


def test_prompts_of_a_chat_model_are_what_its_rollouts_continue(chat_student):
    module = make_module(chat_student, {}, no_teacher())
    rolled = act(module, [{"prompt": "1+1="}, {"prompt": CHAT}, {"prompt": "what is a sum?"}])
    assert (teacher_forced(module, "student", rolled) - rolled.behavior_log_probs).abs().max() < 1e-4
    assert module.tokenizer().chat_template == CHAT_TEMPLATE
    _, texts = module.rewards(rolled)
    assert [row["prompt"] for row in texts] == ["1+1=", "system: Be brief.\nuser: 1+1=", "what is a sum?"]
    assert not any("<|" in row["completion"] for row in texts), "stop tokens are no text"


# -- given completions ------------------------------------------------------------------------------------------------

ENDED_OTHERWISE = CHAT_TEMPLATE.replace("<|im_end|>", "<|end|>")  # than by the tokenizer's eos, as Gemma's and Phi's


@pytest.mark.parametrize("generation", [{"eos_token_id": [3, 4]}, {}], ids=["known", "unknown to the checkpoint"])
def test_a_given_turn_and_a_rollout_end_as_the_template_ends_turns(tmp_path, generation):
    folder = save_model(tmp_path, tokenizer=chat_tokenizer(ENDED_OTHERWISE), rows=104, generation=generation)
    module = make_module(folder, {}, no_teacher())
    assert module.eos == [3, 4]
    row = {"prompt": "1+1=", "completion": "2"}
    given = module.act("dataset", [row, {**row, "completion": [{"role": "assistant", "content": "2"}]}], [0, 1])
    assert [module.tokenizer().decode(ids) for ids in given.actions] == ["2<|end|>"] * 2
    assert bool(given.stopped.all())
    rolled = act(module, [{"prompt": "1+1="}] * 16, temperature=5.0, horizon=60)
    ends = {int(row.actions[0, row.mask[0]][-1]) for row in rolled.split(1) if bool(row.stopped)}
    assert ends == {3, 4}


def test_the_end_of_a_turn_is_no_part_of_what_was_said(tmp_path):
    """Also where the tokenizer doesn't call it special, so that it would decode it."""
    tokenizer = chat_tokenizer(CHAT_TEMPLATE.replace("<|im_end|>", "<end>"))
    tokenizer.add_tokens(["<end>"])
    module = make_module(save_model(tmp_path, tokenizer=tokenizer, rows=104), {}, no_teacher())
    given = module.act("dataset", [{"prompt": "1+1=", "completion": "2"}], [0])
    assert module.tokenizer().decode(given.actions[0], skip_special_tokens=True) == "2<end>"
    assert module.rewards(given)[1][0]["completion"] == "2"


def test_given_turns_are_cut_at_the_horizon_and_train_what_the_assistant_writes(chat_student):
    answers = [{"role": "assistant", "content": "2"}, {"role": "user", "content": "why?"}]
    answers.append({"role": "assistant", "content": "so"})
    module = make_module(chat_student, {}, no_teacher())
    row = {"prompt": "1+1=", "completion": answers}
    whole = dataclasses.replace(module.rollout, horizon=80)
    for rollout, text, stopped in ((whole, "2<|im_end|>so<|im_end|>", True), (module.rollout, "2<|im_end|>", False)):
        module.rollout = rollout
        given = module.act("dataset", [row], [0])
        assert module.tokenizer().decode(given.actions[0, given.mask[0]]) == text
        assert bool(given.stopped[0]) is stopped
        ids = torch.cat([given.observation["input_ids"], given.actions], 1)
        with torch.no_grad():
            plain = module.student(input_ids=ids).logits[:, -given.actions.shape[1] - 1 : -1, : module.vocabulary]
        expected = plain.log_softmax(-1).gather(-1, given.actions[..., None]).squeeze(-1)
        assert (teacher_forced(module, "student", given) - expected)[given.mask].abs().max() < 1e-4


# -- rows, as data and setting read them together ---------------------------------------------------------------------


def checked(module, folder, rows, **settings) -> PromptData:
    """The data after the checks that come before training."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = PromptData(train=str(path), **settings)
    module.trainer = data.trainer = make_trainer(folder)
    data.trainer.strategy._lightning_module = module
    data.setup("fit")
    return data


TOOL = {"type": "function", "function": {"name": "add", "description": "x", "parameters": {"type": "object"}}}
WITH_TOOLS = "{% for tool in tools or [] %}{{ tool.function.name }}! {% endfor %}" + CHAT_TEMPLATE
CALLING = WITH_TOOLS.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}")
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}


@pytest.fixture(scope="session")
def tool_student(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tools"), tokenizer=chat_tokenizer(CALLING), rows=104)


def test_tools_of_a_row_are_shown_to_student_and_teacher(tool_student, tmp_path):
    view = PromptView("{{ answer }}, {{ prompt }}")
    module = make_module(tool_student, {"teacher": Teacher(Live(), view)})
    rows = [{"prompt": "1+1=", "answer": "2", "tools": [TOOL]}, {"prompt": "1+1=", "answer": "2", "tools": None}]
    data = checked(module, tmp_path, rows)
    for look, said in ((dict, "1+1="), (view, "2, 1+1=")):
        with_tools, without = (module.prompt_ids(look(dict(row)), module.policies["student"]) for row in data.train)
        assert module.tokenizer().decode(with_tools) == "add! " + module.tokenizer().decode(without)
        assert said in module.tokenizer().decode(without)


def test_a_call_without_text_is_a_message(tool_student, tmp_path):
    chat = [{"role": "user", "content": "1+1="}, CALL, {"role": "tool", "content": "2"}]
    data = checked(make_module(tool_student, {}, no_teacher()), tmp_path, [{"prompt": chat}] * 3)
    assert len(data.train) == 3


ASKED = {"role": "user", "content": "1+1="}
ANSWERED = {"role": "assistant", "content": "2"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": [ASKED, ANSWERED]}, "the prompt's last message is the assistant's"),
        ({"prompt": "1", "tools": [TOOL]}, "the row has tools, which the chat template of .* does not write"),
        ({"prompt": [ASKED, {**ANSWERED, "content": None}, ASKED]}, "message 2 of the prompt has no content"),
        ({"prompt": [{"from": "human", "value": "1"}]}, "message 1 of the prompt has no role: .*it has from, value"),
        ({"prompt": "<|im_start|>user\n1+1=<|im_end|>\n"}, "the prompt holds '<|im_end|>'.* model.raw_prompts"),
        ({"prompt": "1", "completion": [ASKED]}, "the completion's first and last message must be the assistant's"),
        ({"prompt": "1", "completion": ["2"]}, "message 1 of the completion has no role"),
        ({"prompt": "1", "completion": "2<|im_end|>3"}, "goes on behind the stop token '<|im_end|>'"),
    ],
)
def test_a_row_that_can_t_be_rendered_is_named_or_skipped(chat_student, tmp_path, row, reason):
    half = Rollout(batch_size=8, horizon=10, behavior={"student": 0.5, "dataset": 0.5})
    good = {"prompt": "1", "completion": "2"}
    for column, other in (("prompt", [ASKED]), ("completion", [ANSWERED])):  # a column holds values of one kind
        if isinstance(row.get(column), list):
            good[column] = other
    rows = [good, good, good | row]
    module = make_module(chat_student, {}, no_teacher(), rollout=half)
    with pytest.raises(ValueError, match=f"row 3: .*{reason.replace('|', '[|]')}"):
        checked(module, tmp_path, rows)
    assert len(checked(module, tmp_path, rows, on_bad_row="skip").train) == 2


def test_an_answer_at_the_end_can_be_dropped_or_trained(chat_student, tmp_path):
    given = Rollout(batch_size=8, horizon=10, behavior={"dataset": 1.0})
    module = make_module(chat_student, {}, no_teacher(), rollout=given)
    rows, columns = [{"messages": [ASKED, ANSWERED]}] * 3, {"prompt": "messages"}
    data = checked(module, tmp_path, rows, columns=columns, last_answer="completion")
    assert module.tokenizer().decode(module.prompt_ids(dict(data.train[0]), module.policies["student"])) == shown(
        module, "1+1="
    )
    assert module.tokenizer().decode(module.act("dataset", [dict(data.train[0])], [0]).actions[0]) == "2<|im_end|>"


# -- ids ------------------------------------------------------------------------------------------------------------


def test_a_prompt_of_a_tokenizer_that_closes_texts_is_left_open(tmp_path):
    tokenizer = chat_tokenizer(None)
    closed = {"single": "<s> $A <|im_end|>", "special_tokens": [("<s>", 1), ("<|im_end|>", 3)]}
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(**closed)
    module = make_module(save_model(tmp_path, tokenizer=tokenizer, rows=104), {}, no_teacher())
    assert shown(module, "1+1=") == "<s>1+1="
    given = module.act("dataset", [{"prompt": "1+1=", "completion": "2"}], [0])
    assert module.tokenizer().decode(given.actions[0]) == "2<|im_end|>"


def test_padding_needs_no_row_of_its_own(tmp_path):
    tokenizer = chat_tokenizer()
    rows = len(tokenizer)
    folder = save_model(tmp_path / "model", tokenizer=tokenizer, rows=rows)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # added to the tokenizer alone: its id is `rows`
    tokenizer.save_pretrained(folder)
    module = make_module(folder, {}, no_teacher())
    assert module.tokenizer().pad_token_id == rows
    fit(module, tmp_path / "run", [{"prompt": "1+" * i + "1=", "completion": "2"} for i in range(16)])


# -- models that read more than text --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma_with_eyes(tmp_path_factory):
    """AutoModelForCausalLM loads it with its vision tower."""
    folder, tokenizer = tmp_path_factory.mktemp("gemma"), chat_tokenizer()
    text = {
        "vocab_size": 110, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3,
    }  # fmt: skip
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    eyes |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4, image_token_index=109)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["full", "lora"])
def test_eyes_that_no_text_reaches_are_refused_with_what_freezes_them(lora, gemma_with_eyes, tmp_path):
    advice = "multi_modal_projector|vision_tower" if lora is None else "vision_tower"
    module = make_module(Pretrained(str(gemma_with_eyes), lora=lora), {}, no_teacher())
    with pytest.raises(ValueError, match=rf"parameters, such as \S+: set student\.freeze to '{re.escape(advice)}'"):
        fit(module, tmp_path, steps=1)
    spec = Pretrained(str(gemma_with_eyes), lora=lora, freeze=advice)
    assert fit(make_module(spec, {}, no_teacher()), tmp_path, steps=1).global_step == 1
