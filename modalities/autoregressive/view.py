"""Views built from dataset columns."""

from __future__ import annotations

from typing import Any

from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...chat import is_chat
from ...policy import View
from ...trajectory import Example
from .messages import options_of, transcript

_jinja = ImmutableSandboxedEnvironment(keep_trailing_newline=True)


class PromptView(View):
    """View with another prompt in place of the example's, written from its columns.

    Args:
        prompt: a Jinja template over the columns, such as ``"{{ solution }}\\n\\nNow answer: {{ prompt }}"``, or a
            list of chat messages whose contents are such templates. ``prompt`` is the student's own prompt; where
            that is a chat, the template sees the last user message's text and the messages before it stay. Images
            among the parts of a message stay too; where messages replace the chat, its first user message gets them.
            Another column that holds a chat, such as a ``completion``, is written as its text.

    An example in which one of the named columns is empty has no view.

    Raises:
        ValueError: the last of several messages is the assistant's.
    """

    def __init__(self, prompt: str | list[dict[str, str]]) -> None:
        self._templates = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        self._roles = None if isinstance(prompt, str) else [message["role"] for message in prompt]
        if self._roles and self._roles[-1] == "assistant":
            raise ValueError(
                "PromptView.prompt: the last message is the assistant's: that answer would be read, and a second one "
                "asked for. End with a message of the user"
            )
        columns = set().union(*(meta.find_undeclared_variables(_jinja.parse(text)) for text in self._templates))
        self.columns = tuple(sorted(columns))
        self._compiled = [_jinja.from_string(text) for text in self._templates]

    def __call__(self, example: Example) -> Example | None:
        if any(example.get(column) in (None, "") for column in self.columns):
            return None
        original = example["prompt"]
        values = {column: _Chat(value) if is_chat(value) else value for column, value in example.items()}
        texts = [template.render({**values, "prompt": last_text(original)}) for template in self._compiled]
        prompt: Any
        if self._roles is not None:
            prompt = [{"role": role, "content": text} for role, text in zip(self._roles, texts, strict=True)]
            if media := [part for message in original if isinstance(message, dict) for part in other_parts(message)]:
                asker = next((m for m in prompt if m["role"] == "user"), prompt[-1])
                asker["content"] = [*media, {"type": "text", "text": asker["content"]}]
        elif isinstance(original, str):
            prompt = texts[0]
        else:
            prompt = [*original[:-1], with_text(original[-1], texts[0])]
        return {**example, "prompt": prompt}


class TemplateOptions(View):
    """View that the chat template renders with options of its own, such as a teacher that thinks.

        view: {class_path: TemplateOptions, init_args: {options: {enable_thinking: true}}}

    Args:
        options: as in the column ``chat_template_kwargs``; they go before those of the row and of the setting.
        view: what is shown otherwise; None: the example itself.
    """

    def __init__(self, options: dict[str, Any], view: View | None = None) -> None:
        self.options, self.view = options, view
        self.columns = () if view is None else view.columns

    def __call__(self, example: Example) -> Example | None:
        shown_example = example if self.view is None else self.view(example)
        if shown_example is None:
            return None
        options = {**options_of(shown_example), **self.options}
        return {**shown_example, "chat_template_kwargs": options}


class FirstOf(View):
    """View that is the first of several that shows anything.

    SDPO (2601.20802) shows a sibling that was right, and the verifier's words only where there is none.

    Args:
        views: in the order of preference.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, views: list[View]) -> None:
        if not views:
            raise ValueError("FirstOf.views is empty")
        self.views = views
        self.columns = tuple(dict.fromkeys(column for view in views for column in view.columns))

    def __call__(self, example: Example) -> Example | None:
        views = (view(example) for view in self.views)
        return next((row for row in views if row is not None), None)


class _Chat(list[dict[str, Any]]):
    """Messages, as a list and as text."""

    def __str__(self) -> str:
        return transcript(self)


def with_text(message: dict[str, Any], text: str) -> dict[str, Any]:
    """Replaces the text of a message; other parts, such as images, stay where they are."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": text}
    first = next((i for i, part in enumerate(content) if part.get("type") == "text"), len(content))
    before, after = ([p for p in some if p.get("type") != "text"] for some in (content[:first], content[first:]))
    return {**message, "content": [*before, {"type": "text", "text": text}, *after]}


def other_parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Lists the parts of a message that are no text."""
    content = message["content"]
    return [] if isinstance(content, str) else [part for part in content if part.get("type") != "text"]


def last_text(prompt: str | list[dict[str, Any]]) -> str:
    """Returns the text of a prompt: of its last message, where it is a chat."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)
