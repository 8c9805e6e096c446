"""Messages as chat templates read them, and as people do: tools, thoughts, calls and parts of contents."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from ...chat import Chat, Message
from ...printable import quoted
from ...trajectory import Example

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # what data sets call them in a message
_TAG = re.compile(r"([<\[◁][\w:]+[>\]▷])(\s*)$")  # with which a thought begins
PLACEHOLDER = "TEXT"  # stands for what somebody says, where a template is asked what it writes around it


def text_only(chat: Chat, example: Example) -> Chat:
    """The chat with contents of text, as the templates of language models read them.

    Raises:
        ValueError: a part of a content is no text.
    """
    return [{**message, "content": _joined(message["content"], number)} for number, message in enumerate(chat, 1)]


def tools_of(example: Example) -> list[Any]:
    """The row's tools; none where it has none.

    Raises:
        ValueError: they are no list, or no JSON.
    """
    tools = _read(example, "tools", list) or []
    return [_without_nulls(_parsed("tools", tool)) for tool in tools]


def options_of(example: Example) -> dict[str, Any]:
    """The row's options for the template; a null is none, as tables give each row the keys of all others."""
    options: dict[str, Any] = _without_nulls(_read(example, "chat_template_kwargs", dict) or {})
    return options


def transcript(prompt: str | Chat) -> str:
    """A whole prompt to look at; of a chat of several messages, each with its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and not prompt[0].get("tool_calls"):
        return shown_text(prompt[0])
    return "\n".join(f"{message['role']}: {shown_text(message)}" for message in prompt)


def shown_text(message: Message) -> str:
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", f"<{part.get('type')}>") for part in content)
    calls = message.get("tool_calls")
    return content + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _read(example: Example, column: str, kind: type) -> Any:
    """A column that holds a list or an object, or the same as JSON text."""
    value = _parsed(column, example.get(column))
    if value not in (None, "") and not isinstance(value, kind):
        raise ValueError(f"{column} is {quoted(value)}; it must be {'a list' if kind is list else 'an object'}")
    return value


def _parsed(column: str, value: Any) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{column} is text, but no JSON: {error}") from error


def plain(message: Message) -> Message:
    """A message as templates take it: without the keys that are null, calls with arguments instead of their JSON; a
    content that is null is empty."""
    kept: Message = _without_nulls(message)
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = [_called(call) for call in calls]
    return {**kept, "content": kept.get("content", "")}


def _called(call: Any) -> Any:
    """A call whose arguments are an object, as templates write them; APIs have them as JSON."""
    if isinstance(call, dict) and "function" in call:
        return {**call, "function": _called(call["function"])}
    if isinstance(call, dict) and isinstance(call.get("arguments"), str):
        with suppress(ValueError):
            return {**call, "arguments": json.loads(call["arguments"])}
    return call


def _without_nulls(value: Any) -> Any:
    """Without the keys that tables add to every message and tool."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    # what a tool is called with may be null
    return {k: v if k == "arguments" else _without_nulls(v) for k, v in value.items() if v is not None}


def _joined(content: str | list[Any], number: int) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError(
                f"message {number} has a part that is no text: {quoted(part)}; write {{type: text, text: …}}"
            )
    return "".join(part["text"] for part in content)


def holds(turn: str, message: Message) -> bool:
    """Whether all that a message says is in its turn, whatever white space the template puts between."""
    content = message.get("content") or ""
    said = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    calls = [call.get("function") or call for call in message.get("tool_calls") or ()]
    named = [call.get("name") or "" for call in calls]
    found = "".join(turn.split())
    thoughts = [message.get(name) or "" for name in _THOUGHTS]
    return all("".join(text.split()) in found for text in (*said, *thoughts, *named))


def saying_otherwise(message: Message) -> Message:
    """The same message with other text in the same places."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": PLACEHOLDER}
    return {**message, "content": [{**part, "text": PLACEHOLDER} if "text" in part else part for part in content]}


def without_opening(text: str, opening: str) -> str:
    """An answer without the tag with which the prompt has begun it already, such as ``<think>``."""
    tag = _TAG.search(opening)
    if tag is None or not text.lstrip().startswith(tag[1]):
        return text
    return text.lstrip().removeprefix(tag[1]).removeprefix(tag[2])
