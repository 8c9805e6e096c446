"""Views built from dataset columns."""

from __future__ import annotations

from typing import Any

from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...teacher import View
from ...trajectory import Example

_jinja = ImmutableSandboxedEnvironment(keep_trailing_newline=True)


class PromptView(View):
    """Another prompt in place of the example's, written from its columns.

    Args:
        prompt: a Jinja template over the columns, such as ``"{{ solution }}\\n\\nNow answer: {{ prompt }}"``, or a
            list of chat messages whose contents are such templates. ``prompt`` is the student's own prompt; where
            that is a chat, the template sees the last user message's text and the messages before it stay.

    An example in which one of the named columns is empty has no view.
    """

    def __init__(self, prompt: str | list[dict[str, str]]) -> None:
        self._templates = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        self._roles = None if isinstance(prompt, str) else [message["role"] for message in prompt]
        found = set().union(*(meta.find_undeclared_variables(_jinja.parse(text)) for text in self._templates))
        self.columns = tuple(sorted(found))
        self._compiled = [_jinja.from_string(text) for text in self._templates]

    def __call__(self, example: Example) -> Example | None:
        if any(example.get(column) in (None, "") for column in self.columns):
            return None
        own = example["prompt"]
        texts = [template.render({**example, "prompt": last_text(own)}) for template in self._compiled]
        prompt: Any
        if self._roles is not None:
            prompt = [{"role": role, "content": text} for role, text in zip(self._roles, texts, strict=True)]
        elif isinstance(own, str):
            prompt = texts[0]
        else:
            prompt = [*own[:-1], {**own[-1], "content": texts[0]}]
        return {**example, "prompt": prompt}


def last_text(prompt: str | list[dict[str, Any]]) -> str:
    """The text of a prompt: of its last message, where it is a chat."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)
