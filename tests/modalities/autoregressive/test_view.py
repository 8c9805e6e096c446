"""PromptView: a teacher's prompt from dataset columns."""

from __future__ import annotations

import pytest
from jinja2 import TemplateSyntaxError
from jinja2.exceptions import SecurityError

from opd_lightning.modalities.autoregressive import PromptView, TemplateOptions
from opd_lightning.modalities.autoregressive.view import last_text
from opd_lightning.pretrained import Pretrained
from opd_lightning.teacher import Frozen, Teacher
from tests.tiny import LongerIsBetter, make_module

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1="},
]


def test_columns_are_read_off_the_template():
    assert PromptView("{{ solution }}\n{{ prompt }}").columns == ("prompt", "solution")
    assert PromptView("{% for step in steps %}{{ step.text }}{% endfor %}").columns == ("steps",)
    assert PromptView([{"role": "user", "content": "{{ a }}"}, {"role": "user", "content": "{{ b }}"}]).columns == (
        "a",
        "b",
    )


def test_what_jinja_offers_is_no_column():
    view = PromptView("{% for i in range(2) %}{{ hint }}{% endfor %}{{ prompt }}")
    assert view.columns == ("hint", "prompt")
    assert view({"prompt": "1+1=", "hint": "#"}) == {"prompt": "##1+1=", "hint": "#"}


def test_a_string_prompt_is_replaced_and_other_columns_stay():
    example = {"prompt": "1+1=", "solution": "one and one", "answer": "2"}
    shown = PromptView("{{ solution }}: {{ prompt }}\n")(example)
    assert shown == {**example, "prompt": "one and one: 1+1=\n"}
    assert example["prompt"] == "1+1=", "the example itself is left alone"


@pytest.mark.parametrize("missing", [{"solution": None}, {"solution": ""}, {}])
def test_an_empty_column_means_no_view(missing):
    assert PromptView("{{ solution }}{{ prompt }}")({"prompt": "1+1=", **missing}) is None


@pytest.mark.parametrize("value", [0, False])
def test_zero_is_not_empty(value):
    shown = PromptView("{{ grade }} {{ prompt }}")({"prompt": "1+1=", "grade": value})
    assert shown is not None
    assert shown["prompt"] == f"{value} 1+1="


def test_in_a_chat_the_last_message_is_rewritten_and_the_others_stay():
    shown = PromptView("{{ solution }}: {{ prompt }}")({"prompt": CHAT, "solution": "2"})
    assert shown is not None
    assert shown["prompt"] == [CHAT[0], {"role": "user", "content": "2: 1+1="}]
    assert CHAT[1]["content"] == "1+1="


def test_messages_replace_the_whole_chat():
    view = PromptView(
        [{"role": "system", "content": "Known: {{ solution }}"}, {"role": "user", "content": "{{ prompt }}"}]
    )
    for prompt in ("1+1=", CHAT):
        shown = view({"prompt": prompt, "solution": "2"})
        assert shown is not None
        assert shown["prompt"] == [{"role": "system", "content": "Known: 2"}, {"role": "user", "content": "1+1="}]


IMAGE, OTHER = {"type": "image", "path": "a.png"}, {"type": "image"}


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ([IMAGE, {"type": "text", "text": "1+1="}], [IMAGE, {"type": "text", "text": "2: 1+1="}]),
        ([{"type": "text", "text": "1+1="}, IMAGE], [{"type": "text", "text": "2: 1+1="}, IMAGE]),
        (
            [IMAGE, {"type": "text", "text": "1+"}, OTHER, {"type": "text", "text": "1="}],
            [IMAGE, {"type": "text", "text": "2: 1+1="}, OTHER],
        ),
        ([IMAGE], [IMAGE, {"type": "text", "text": "2: "}]),
    ],
)
def test_image_parts_stay_where_the_text_is_rewritten(content, shown):
    example = {"prompt": [CHAT[0], {"role": "user", "content": content}], "solution": "2"}
    found = PromptView("{{ solution }}: {{ prompt }}")(example)
    assert found is not None
    assert found["prompt"] == [CHAT[0], {"role": "user", "content": shown}]
    assert example["prompt"][1]["content"] is content


def test_messages_that_replace_a_chat_take_its_image_parts_over():
    view = PromptView(
        [{"role": "system", "content": "Known: {{ solution }}"}, {"role": "user", "content": "{{ prompt }}"}]
    )
    chat = [{"role": "user", "content": [OTHER]}, {"role": "user", "content": [IMAGE, {"type": "text", "text": "?"}]}]
    shown = view({"prompt": chat, "solution": "2"})
    assert shown is not None
    assert shown["prompt"] == [
        {"role": "system", "content": "Known: 2"},
        {"role": "user", "content": [OTHER, IMAGE, {"type": "text", "text": "?"}]},
    ]


def test_last_text():
    assert last_text("1+1=") == "1+1="
    assert last_text(CHAT) == "1+1="
    parts = [{"type": "image"}, {"type": "text", "text": "what"}, {"type": "text", "text": "?"}]
    assert last_text([{"role": "user", "content": parts}]) == "what?"


def test_templates_are_sandboxed_and_broken_ones_raise_when_built():
    with pytest.raises(TemplateSyntaxError):
        PromptView("{{ solution ")
    with pytest.raises(SecurityError):
        PromptView("{{ prompt.__class__.__mro__[1].__subclasses__() }}")({"prompt": "1+1="})


def test_the_module_names_who_needs_a_column(tiny_student):
    teachers = {
        "teacher": Teacher(
            Frozen(Pretrained(str(tiny_student))), PromptView("{{ solution }}{{ prompt }}"), where={"task": "even"}
        )
    }
    module = make_module(tiny_student, teachers, load=False, reward=LongerIsBetter())
    assert module.required_columns() == {
        "prompt": "the rollout, model.teachers.teacher",
        "answer": "model.reward",
        "solution": "model.teachers.teacher",
        "task": "model.teachers.teacher",
    }


def test_a_column_that_holds_a_chat_is_written_as_its_text():
    said = [{"role": "assistant", "content": "it is 2"}]
    row = {"prompt": "1+1=", "completion": said}
    assert PromptView("{{ completion }}! {{ prompt }}")(row)["prompt"] == "it is 2! 1+1="
    each = PromptView("{% for message in completion %}{{ message.role }}, {% endfor %}")
    assert each(row)["prompt"] == "assistant, "


def test_messages_that_end_with_the_assistant_s_are_refused():
    answered = [{"role": "user", "content": "{{ prompt }}"}, {"role": "assistant", "content": "{{ answer }}"}]
    with pytest.raises(ValueError, match=r"PromptView\.prompt: the last message is the assistant's"):
        PromptView(answered)


def test_options_of_the_template_go_before_those_of_the_row_and_stand_over_another_view():
    row = {"prompt": "1+1=", "hint": "#", "chat_template_kwargs": {"style": "dry", "enable_thinking": False}}
    options = TemplateOptions({"enable_thinking": True}, PromptView("{{ hint }}{{ prompt }}"))
    assert options.columns == ("hint", "prompt")
    assert options(row) == {
        **row,
        "prompt": "#1+1=",
        "chat_template_kwargs": {"style": "dry", "enable_thinking": True},
    }
    assert options({**row, "hint": ""}) is None
    assert row["chat_template_kwargs"]["enable_thinking"] is False, "the example itself is left alone"
    assert options({**row, "chat_template_kwargs": '{"style": "dry"}'})["chat_template_kwargs"] == {
        "style": "dry",
        "enable_thinking": True,
    }, "a table holds them as text"
