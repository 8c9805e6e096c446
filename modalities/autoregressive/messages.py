"""Messages as chat templates read them, and as people do: tools, thoughts, calls and parts of contents."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ...chat import Chat, Message
from ...printable import quoted
from ...trajectory import Example

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # what data sets call them in a message
_TAG = re.compile(r"([<\[◁][\w:]+[>\]▷])(\s*)$")  # with which a thought begins
SHOWN = 200  # characters of a text in a message to people
PLACEHOLDER = "TEXT"  # content of a message, to find what a template writes around it


def text_only(chat: Chat, example: Example) -> Chat:
    """Joins contents to text, as the templates of language models read them.

    Raises:
        ValueError: a part of a content is no text.
    """
    return [{**message, "content": _joined(message["content"], number)} for number, message in enumerate(chat, 1)]


def tools_of(example: Example) -> list[Any]:
    """Reads the row's tools; an empty list where it has none.

    Raises:
        ValueError: they are no list, or no JSON.
    """
    tools = _read(example, "tools", list) or []
    return [_without_nulls(_parsed("tools", tool)) for tool in tools]


def options_of(example: Example) -> dict[str, Any]:
    """Reads the row's options for the template, without nulls: tables give each row the keys of all others."""
    options: dict[str, Any] = _without_nulls(_read(example, "chat_template_kwargs", dict) or {})
    return options


def transcript(prompt: str | Chat) -> str:
    """Writes a prompt for people; of a chat of several messages, each with its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and not prompt[0].get("tool_calls"):
        return shown_text(prompt[0])
    return "\n".join(f"{message['role']}: {shown_text(message)}" for message in prompt)


def shown_text(message: Message) -> str:
    """Writes a message for people: its text, the types of its other parts, its calls."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", f"<{part.get('type')}>") for part in content)
    calls = message.get("tool_calls")
    return content + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _read(example: Example, column: str, kind: type) -> Any:
    """Reads a column that holds a list or an object, or the same as JSON text."""
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


def sampled_ids(completion: str | Chat) -> list[list[int] | None]:
    """Lists the token ids that the assistant's messages were sampled as, None for those that hold text alone."""
    if isinstance(completion, str):
        return [None]
    return [message.get("ids") for message in completion if message["role"] == "assistant"]


def with_contents(completion: Any, decode: Callable[[list[int]], str], stops: list[int]) -> Any:
    """Writes as text the messages of a completion that hold ids alone."""
    if not isinstance(completion, list):
        return completion
    return [
        {**m, "content": decode([i for i in m["ids"] if i not in stops])}
        if isinstance(m, dict) and m.get("ids") and m.get("content") is None and not m.get("tool_calls")
        else m
        for m in completion
    ]


def as_sampled(
    given: list[int], new: list[int], end: int, stops: list[int], number: int, tokenizer: Any
) -> tuple[list[int], int]:
    """Puts the ids of a turn that were sampled in the place of those that the template writes, up to their end.

    Args:
        given: were sampled.
        new: are written by the template, the turn's ``end`` of them and what follows.
        end: behind the stop token of ``new``.
        stops: ids that end a turn.
        number: of the turn.
        tokenizer: of both.

    Raises:
        ValueError: both are not the same text.
    """
    ended = given[-1] in stops
    written, sampled = (tokenizer.decode(ids) for ids in (new[: end - 1], given[: len(given) - ended]))
    if written != sampled:
        raise ValueError(
            f"the ids of turn {number} of the completion write {quoted(sampled, SHOWN)}, and there the chat template "
            f"of {tokenizer.name_or_path} writes {quoted(written, SHOWN)}: the conversation would not hold what was "
            "sampled"
        )
    return given + new[end if ended else end - 1 :], len(given)


def parting(conversation: str, starts: list[str], messages: list[Message], opening: str) -> str:
    """Describes where a rendered conversation parts from the messages: the turn, and both texts.

    Args:
        conversation: as the template writes all of it.
        starts: the prompt of each of the assistant's turns.
        messages: the assistant's, as the row has them.
        opening: what the template begins each of them with.
    """
    for number, (start, message) in enumerate(zip(starts, messages, strict=True), 1):
        if not conversation.startswith(start):
            same = next(i for i, (a, b) in enumerate(zip(f"{conversation}\0", start, strict=False)) if a != b)
            return (
                f"before turn {number} it writes {quoted(conversation[same:], SHOWN)}, where "
                f"{quoted(start[same:], SHOWN)} was read when that turn was written"
            )
        later = [other for other in starts[number:] if conversation.startswith(other)]
        turn = conversation[len(start) : len(later[0]) if later else None]
        if not holds(opening + turn, message):
            return f"of turn {number} it writes {quoted(turn, SHOWN)}, and the row has {quoted(_given(message), SHOWN)}"
    return "its turns are not the row's"


def _given(message: Message) -> str:
    """Writes a message with its thoughts, for messages to people."""
    return "".join(str(message.get(name) or "") for name in _THOUGHTS) + shown_text(message)


def plain(message: Message) -> Message:
    """Converts a message for templates: no null keys, calls with arguments instead of JSON; a null content is empty."""
    converted: Message = _without_nulls(message)
    converted.pop("ids", None)
    if calls := converted.get("tool_calls"):
        converted["tool_calls"] = [_called(call) for call in calls]
    return {**converted, "content": converted.get("content", "")}


def _called(call: Any) -> Any:
    """Parses a call's arguments, which APIs have as JSON, to an object, as templates write them."""
    if isinstance(call, dict) and "function" in call:
        return {**call, "function": _called(call["function"])}
    if isinstance(call, dict) and isinstance(call.get("arguments"), str):
        with suppress(ValueError):
            return {**call, "arguments": json.loads(call["arguments"])}
    return call


def _without_nulls(value: Any) -> Any:
    """Drops null keys, which tables add to every message and tool."""
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
    """Tells whether all text of a message is in its turn, but for white space."""
    content = message.get("content") or ""
    texts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
    calls = [call.get("function") or call for call in message.get("tool_calls") or ()]
    named = [call.get("name") or "" for call in calls]
    written = "".join(turn.split())
    thoughts = [message.get(name) or "" for name in _THOUGHTS]
    return all("".join(text.split()) in written for text in (*texts, *thoughts, *named))


def saying_otherwise(message: Message) -> Message:
    """Replaces the text of a message by other text, in the same places."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": PLACEHOLDER}
    return {**message, "content": [{**part, "text": PLACEHOLDER} if part.get("text") else part for part in content]}


def without_opening(text: str, opening: str) -> str:
    """Removes the tag with which the prompt has begun an answer already, such as ``<think>``."""
    tag = _TAG.search(opening)
    if tag is None or not text.lstrip().startswith(tag[1]):
        return text
    return text.lstrip().removeprefix(tag[1]).removeprefix(tag[2])
