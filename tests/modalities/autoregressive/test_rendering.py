"""From a row to ids: prompt and completion together are the conversation as the template writes it, token by token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from opd_lightning.modalities.autoregressive.messages import transcript
from opd_lightning.modalities.autoregressive.rendering import Renderer

# As the models of these names have them, in as far as a conversation with tools needs it: what stands around a turn,
# what is trimmed, what only an answer or only a prompt has
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{% if loop.last %}<think>\n{{ thought | trim }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}{% else %}"
    "<Assistant>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)
MISTRAL3 = (  # shows the system message in the last message alone
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == "
    "'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]{% elif m.tool_calls %}<call>"
    "{{ m.tool_calls[0].function.name }}{{ eos_token }}{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'tool' %}<result>{{ m.content }}</result>{% endif %}{% endfor %}"
)
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ENDS = {  # template, the token that ends its turns
    "ChatML": (CHATML, "<|im_end|>"),
    "Llama 3": (LLAMA3, "<|eot_id|>"),
    "Gemma": (GEMMA, "<end_of_turn>"),
    "Mistral": (MISTRAL, "</s>"),
    "Qwen 3": (QWEN3, "<|im_end|>"),
    "DeepSeek R1": (R1, "</s>"),
}
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIALS += ["<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
SPECIALS += ["[INST]", "[/INST]", "<User>", "<Assistant>"]
CORPUS = [
    "the answer is 42 and 17 and 1000\n\n\n",
    "what is  the   sum of 12 and 30 ?\n",
    "a cat , the cats . <think>\n\n</think>",
] * 9
QUESTION = [{"role": "user", "content": "what is 12 and 30?"}]


def trained(made: Tokenizer, alphabet: list[str], size: int) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


def byte_level() -> Tokenizer:
    """As those of Llama 3 and Qwen: spaces and line breaks join what stands beside them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def sentencepiece(everywhere: bool) -> Tokenizer:
    """As those of Llama 2, Mistral and Gemma: texts begin with a space that nobody wrote."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False, fuse_unk=False))
    if everywhere:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    return trained(made, [*map(chr, range(33, 127)), "▁", "\n"], 300)


TOKENIZERS = {"bytes": byte_level(), "first": sentencepiece(False), "every": sentencepiece(True)}


def renderer(template: str | None, kind: str = "bytes", closes: bool = False, **settings: Any) -> Renderer:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(TOKENIZERS[kind].to_str()),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIALS[3:],
        clean_up_tokenization_spaces=False,
    )
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>"))
    around = {"single": "<s> $A </s>" if closes else "<s> $A", "special_tokens": [("<s>", begin), ("</s>", end)]}
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(**around)
    tokenizer.chat_template = template
    return Renderer(tokenizer, **settings)


def ids(made: Renderer, text: str) -> list[int]:
    return made.tokenizer(text, add_special_tokens=False)["input_ids"]


def stops(made: Renderer, *tokens: str) -> list[int]:
    return [made.tokenizer.convert_tokens_to_ids(token) for token in ("</s>", *tokens)]


def both(made: Renderer, row: dict[str, Any], *ends: str) -> tuple[str, str]:
    """What a row's prompt and its completion read."""
    given_ids, _ = made.completion(row, stops(made, *ends))
    return made.tokenizer.decode(made.prompt_ids(row)), made.tokenizer.decode(given_ids)


# -- together they are the conversation ------------------------------------------------------------------------------

words = st.lists(
    st.sampled_from(["the", "cat", "42", "1000", "a", ",", "\n", "\n\n", " ", "  ", "?", "is"]), min_size=1, max_size=6
)
said = words.map(" ".join).filter(str.strip) | words.map("".join).filter(str.strip)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", [*ENDS, "Phi 3", "Qwen 3, no thinking"])
@hypothesis_settings(max_examples=15)
@given(question=said, answer=said)
def test_prompt_and_completion_are_the_conversation(kind, name, question, answer):
    options = {"enable_thinking": False} if "no thinking" in name else {}
    template, end = {**ENDS, "Phi 3": (PHI3, "<|end|>"), "Qwen 3, no thinking": (QWEN3, "<|im_end|>")}[name]
    made = renderer(template, kind, options=options)
    row = {"prompt": question, "completion": answer}
    given_ids, written = made.completion(row, stops(made, end))
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    whole = made.tokenizer.apply_chat_template(chat, tokenize=False, **options)
    assert all(written)
    assert given_ids[-1] == stops(made, end)[-1], "ends as the template ends a turn"
    if name == "DeepSeek R1":  # its prompts begin a thought that its conversations leave out
        text = made.prompt(row) + answer + end
        assert made.tokenizer.decode(made.prompt_ids(row) + given_ids) == made.tokenizer.decode(ids(made, text))
        return
    together, expected = made.prompt_ids(row) + given_ids, ids(made, whole)
    if expected[: len(together)] != together:  # a token of the whole reaches across the border: the text is the same
        assert made.prompt_ids(row) != expected[: len(made.prompt_ids(row))]
        expected = ids(made, whole[: whole.rindex(end)]) + stops(made, end)[-1:]
        assert made.tokenizer.decode(together) == made.tokenizer.decode(expected)


@pytest.mark.parametrize("kind", TOKENIZERS)
@hypothesis_settings(max_examples=40)
@given(prompt=said, completion=said)
def test_without_a_template_they_are_the_text(kind, prompt, completion):
    made = renderer(None, kind)
    row = {"prompt": prompt, "completion": completion}
    given_ids, _ = made.completion(row, stops(made))
    assert given_ids[-1:] == stops(made)
    together = made.prompt_ids(row) + given_ids[:-1]
    assert together[0] == made.tokenizer.bos_token_id
    spelled, whole = (
        "".join(made.tokenizer.convert_ids_to_tokens(some)) for some in (together[1:], ids(made, prompt + completion))
    )
    assert spelled == whole, "no space that the text has not"


def test_a_thought_that_the_template_adds_is_trained():
    row = {"prompt": "12+30?", "completion": "42"}
    prompt, answer = both(renderer(QWEN3), row, "<|im_end|>")
    assert prompt.endswith("<|im_start|>assistant\n")
    assert answer == "<think>\n\n</think>\n\n42<|im_end|>"
    prompt, answer = both(renderer(QWEN3, options={"enable_thinking": False}), row, "<|im_end|>")
    assert prompt.endswith("</think>\n\n")
    assert answer == "42<|im_end|>"


THINKING = QWEN3.replace("assistant\n{% if enable", "assistant\n<think>\n{% if enable")


@pytest.mark.parametrize(
    "thought", ["<think>\nit is easy\n</think>\n\n", "<think>it is easy</think>", "it is easy</think>"]
)
@pytest.mark.parametrize(("template", "end"), [(R1, "</s>"), (THINKING, "<|im_end|>")])
def test_a_thought_that_the_prompt_begins_is_not_begun_twice(template, end, thought):
    row = {"prompt": "12+30?", "completion": f"{thought}42"}
    prompt, answer = both(renderer(template), row, end)
    assert prompt.endswith("<think>\n")
    assert "".join(answer.split()) == f"itiseasy</think>42{end}"
    assert answer[:2] == "it"
    _, answer = both(renderer(template), row | {"completion": "<thinking is hard"}, end)
    assert "<thinking is hard" in answer


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "be brief"}]])
def test_what_a_template_shows_in_the_last_message_alone_changes_no_answer(system):
    made, question = renderer(MISTRAL3), [*system, {"role": "user", "content": "12+30?"}]
    prompt, answer = both(made, {"prompt": question, "completion": "42"})
    assert prompt == f"<s>[INST] {'be brief' + chr(10) * 2 if system else ''}12+30?[/INST]"
    assert answer == " 42</s>"
    given_ids, written = made.completion({"prompt": question, "completion": STEPS}, stops(made))
    assert made.tokenizer.decode(given_ids) == "<call>add</s><result>42</result> it is 42</s>"
    trained = [i for i, own in zip(given_ids, written, strict=True) if own]
    assert made.tokenizer.decode(trained) == "<call>add</s> it is 42</s>"


FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")


@pytest.mark.parametrize(("template", "end"), [(R1, "</s>"), (FORGETFUL, "<|im_end|>")])
def test_a_thought_that_the_template_would_leave_out_is_kept(template, end):
    _, answer = both(renderer(template), {"prompt": "12+30?", "completion": "it is easy</think>42"}, end)
    assert answer == f"it is easy</think>42{end}"


# -- the end of a turn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ENDS, "Phi 3"])
def test_the_end_of_a_turn_is_the_template_s(name):
    template, end = {**ENDS, "Phi 3": (PHI3, "<|end|>")}[name]
    made = renderer(template)
    for known in (stops(made, end), stops(made)):
        assert made.turn_end(known) == stops(made, end)[-1]


def test_a_template_without_an_end_leaves_it_to_the_tokenizer():
    made = renderer(PLAIN)
    assert made.turn_end(stops(made)) is None
    assert both(made, {"prompt": "12+30?", "completion": "42"}) == ("USER: 12+30?\nASSISTANT:", " 42\n</s>")


def test_a_turn_may_end_where_the_next_begins():
    made = renderer(GLM)
    assert made.turn_end(stops(made, "<|user|>")) == stops(made, "<|user|>")[-1]
    assert both(made, {"prompt": "12+30?", "completion": "42"}, "<|user|>")[1] == "42<|user|>"


def test_a_completion_that_holds_its_end_is_not_ended_twice():
    assert both(renderer(None), {"prompt": "a", "completion": "42</s>"})[1] == "42</s>"
    assert both(renderer(CHATML), {"prompt": "a", "completion": "42<|im_end|>"}, "<|im_end|>")[1] == "42<|im_end|>"
    with pytest.raises(ValueError, match="goes on behind the stop token '</s>'"):
        both(renderer(None), {"prompt": "a", "completion": "42</s> and more"})


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_prompt_begins_once_and_does_not_end(kind):
    for closes in (True, False):
        made = renderer(None, kind, closes)
        begin, *rest = made.prompt_ids({"prompt": "the cat"})
        assert begin == made.tokenizer.bos_token_id
        assert rest == ids(made, "the cat")
        assert made.prompt_ids({"prompt": "<s>the cat"}).count(begin) == 1
        chat = renderer(LLAMA3, kind, closes).prompt_ids({"prompt": "the cat"})
        assert chat.count(begin) == 1


# -- chats -----------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": None}}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
STEPS = [CALL, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "it is 42"}]


def test_what_the_assistant_writes_is_trained_and_what_it_reads_is_not():
    made = renderer(CHATML)
    given_ids, written = made.completion({"prompt": QUESTION, "completion": STEPS}, stops(made, "<|im_end|>"))
    trained = [i for i, own in zip(given_ids, written, strict=True) if own]
    assert made.tokenizer.decode(trained) == '<call>add{"a": 1}</call><|im_end|>it is 42<|im_end|>'
    whole = made.tokenizer.apply_chat_template([*QUESTION, {**CALL, "content": ""}, *STEPS[1:]], tokenize=False)
    together = made.prompt_ids({"prompt": QUESTION}) + given_ids
    assert together == ids(made, whole)[: len(together)]
    assert ids(made, whole)[len(together) :] == ids(made, "\n")


def test_turns_that_the_template_writes_otherwise_once_others_follow():
    """Qwen 3 thinks in the last turn alone."""
    made = renderer(QWEN3)
    given_ids, _ = made.completion({"prompt": QUESTION, "completion": STEPS}, stops(made, "<|im_end|>"))
    assert made.tokenizer.decode(given_ids) == (
        "<call>add</call><|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\nit is 42<|im_end|>"
    )


def test_arguments_as_an_api_writes_them_are_read():
    api = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": null}'}}
    row = {"prompt": QUESTION, "completion": [{**CALL, "tool_calls": [api]}]}
    assert both(renderer(CHATML), row, "<|im_end|>")[1] == '<call>add{"a": null}</call><|im_end|>'


ADD = '{"type": "function", "function": {"name": "add", "parameters": {"properties": {"role": {}}}}}'


@pytest.mark.parametrize("tools", [[TOOL], f"[{ADD}]", [ADD]])
def test_tools_of_the_row_go_before_those_of_the_run(tools):
    made = renderer(CHATML, options={"tools": [{"name": "subtract"}]})
    assert '"subtract"' in made.prompt({"prompt": QUESTION, "tools": None})
    shown = made.prompt({"prompt": QUESTION, "tools": tools})
    assert '"add"' in shown
    assert "subtract" not in shown
    assert "null" not in shown, "a table adds keys to every tool"
    assert "content" not in shown
    given_ids, _ = made.completion({"prompt": QUESTION, "tools": tools, "completion": "42"}, stops(made, "<|im_end|>"))
    assert made.tokenizer.decode(given_ids) == "42<|im_end|>"


def test_options_of_the_row_go_before_those_of_the_run():
    made = renderer(QWEN3, options={"enable_thinking": True})
    assert "<think>" not in made.prompt({"prompt": "a"})
    assert "<think>" in made.prompt({"prompt": "a", "chat_template_kwargs": {"enable_thinking": False}})
    made = renderer(QWEN3.replace("is defined", "is defined and style is not defined"))
    added = {"enable_thinking": None, "style": None}
    assert "<think>" not in made.prompt({"prompt": "a", "chat_template_kwargs": added}), "a table adds keys"


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (CHATML, {"prompt": [USER, ANSWER]}, "the prompt's last message is the assistant's: .*data.last_answer: drop"),
        (GEMMA, {"prompt": [USER, {**ANSWER, "role": "model"}]}, "the prompt's last message is the assistant's"),
        (None, {"prompt": [USER]}, "the prompt is a chat but .* has no chat template"),
        (None, {"prompt": "a", "tools": [TOOL]}, "the row has tools, which nothing shows: .* has no chat template"),
        (GEMMA, {"prompt": "a", "tools": [TOOL]}, "the row has tools, which the chat template of .* does not write"),
        (CHATML, {"prompt": "a", "tools": "add"}, "tools is text, but no JSON"),
        (CHATML, {"prompt": "a", "tools": {"name": "add"}}, "tools is {'name': 'add'}; it must be a list"),
        (GEMMA, {"prompt": [USER, CALL, USER]}, "the row has tool_calls, which the chat template"),
        (CHATML, {"prompt": [{"role": "user", "content": ["a"]}]}, "message 1 has a part that is no text: 'a'"),
        (CHATML, {"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "a part that is no text"),
        (CHATML, {"prompt": "a", "completion": 5}, "completion is neither text nor a list of messages: 5"),
        (CHATML, {"prompt": "a", "completion": ["b"]}, "message 1 of the completion has no role"),
        (CHATML, {"prompt": "a", "completion": [{"role": "assistant", "content": None}]}, "message 1 .* no content"),
        (CHATML, {"prompt": "a", "completion": [ANSWER, USER]}, "first and last message must be the assistant's"),
        (None, {"prompt": "a", "completion": [ANSWER]}, "the completion is a chat, but .* has no chat template"),
        (PLAIN, {"prompt": "a", "completion": [ANSWER, USER, ANSWER]}, "ends a turn within the completion with none"),
        (R1, {"prompt": "a", "completion": [ANSWER, USER, ANSWER]}, "does not write the whole completion"),
        (CHATML, {"prompt": "a", "completion": [{**ANSWER, "reasoning_content": "c"}]}, "does not write the whole"),
        (CHATML, {"prompt": "a", "completion": [{**ANSWER, "reasoning": "c"}]}, "does not write the whole"),
        (CHATML, {"prompt": "a", "completion": [{**ANSWER, "thinking": "c"}]}, "does not write the whole"),
        (CHATML, {"prompt": "a", "completion": [{**ANSWER, "tool_calls": "[]"}]}, "tool_calls is no list of {function"),
        (CHATML, {"prompt": "a", "completion": [{**ANSWER, "tool_calls": [{"function": {}}]}]}, "tool_calls is no"),
        (CHATML, {"prompt": [USER, {**ANSWER, "function_call": {"name": "add"}}, USER]}, "the row has function_call"),
        (CHATML, {"prompt": "a", "chat_template_kwargs": {"nothink": 1}}, "of the row: nothink is read by no part"),
        (CHATML, {"prompt": "a", "chat_template_kwargs": {"chat_template": "b"}}, "chat_template is set by"),
        (None, {"prompt": "a", "chat_template_kwargs": {"enable_thinking": True}}, "has chat_template_kwargs, which"),
    ],
)  # fmt: skip
def test_what_can_t_be_rendered_is_refused(template, row, reason):
    with pytest.raises(ValueError, match=reason):
        both(renderer(template), {"completion": "b", **row}, "<|im_end|>")


# writes three roles and no other, and only a system message that comes first
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' and loop.first %}<|system|>{{ m.content | tojson }}"
    "{% elif m.role == 'user' %}<|user|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("role", ["developer", "tool", "system", "weather"])
def test_a_message_that_the_template_does_not_write_is_refused(role):
    lost = {"role": role, "content": "be brief"}
    with pytest.raises(ValueError, match=f"message 2 of the prompt has the role '{role}', and the chat template"):
        renderer(STRICT).prompt({"prompt": [USER, lost, USER]})
    parts = {**lost, "content": [{"type": "text", "text": "be brief"}]}
    with pytest.raises(ValueError, match="message 2 of the prompt"):
        renderer(STRICT).prompt({"prompt": [USER, parts]})
    row = {"prompt": [USER], "completion": [ANSWER, lost, ANSWER]}
    with pytest.raises(ValueError, match=f"message 2 of the completion has the role '{role}'"):
        both(renderer(STRICT), row, "<|end|>")
    assert "be brief" in renderer(CHATML).prompt({"prompt": [USER, lost, USER]})


def test_what_a_template_leaves_out_of_a_message_or_writes_otherwise_is_its_own_affair():
    thought = {"role": "assistant", "content": "<think>so</think>b"}
    assert "so" not in renderer(STRICT).prompt({"prompt": [USER, thought, USER]})
    assert "so" not in renderer(STRICT).prompt({"prompt": [USER, {**ANSWER, "reasoning_content": "so"}, USER]})
    assert "\\n" in renderer(STRICT).prompt({"prompt": [{"role": "system", "content": 'say\n"a"'}, USER]})
    assert "a  b" not in renderer(GEMMA.replace("| trim", "| replace('  ', ' ')")).prompt({"prompt": "a  b"})
    renderer(STRICT).prompt({"prompt": [{"role": "developer", "content": " "}, USER]})


@pytest.mark.parametrize("tools", [[{"name": "x"}], [{"function": "x"}]])
def test_tools_that_a_template_can_t_write_are_named(tools):
    template = "{% for t in tools or [] %}{{ t.function.name.upper() }}{% endfor %}" + CHATML
    with pytest.raises(ValueError, match=r"the column tools holds what the chat template .* can't write \(Undefined"):
        renderer(template).prompt({"prompt": "a", "tools": tools})


def test_parts_of_text_are_read_as_text():
    parts = [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]}]
    assert "user\n1+1<|im_end|>" in renderer(CHATML).prompt({"prompt": parts})


def test_a_prompt_to_look_at_is_the_whole_prompt():
    assert transcript("a") == transcript([USER]) == "a"
    system = {"role": "system", "content": [{"type": "text", "text": "be brief"}, {"type": "image"}]}
    assert transcript([system, USER]) == "system: be brief<image>\nuser: a"
    assert transcript([USER, CALL]) == 'user: a\nassistant: [{"function": {"name": "add", "arguments": {"a": 1}}}]'
