"""Chats: lists of messages ``{role, content}``, as columns hold them."""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Any

from datasets import Dataset, Features, concatenate_datasets

from .printable import quoted

Message = dict[str, Any]
Chat = list[Message]

_ASSISTANTS = ("assistant", "model", "gpt", "bot", "chatbot", "ai")  # the others: of Gemma, ShareGPT, …

# A template may know others; one that is spelled nearly as these is a slip
_ROLES = ("system", "developer", "user", "human", *_ASSISTANTS, "tool", "function", "ipython", "observation")


def is_chat(value: Any) -> bool:
    """Tells whether a column's value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def is_answer(message: Message) -> bool:
    """Tells whether a message is the assistant's, by any of its names."""
    return message["role"] in _ASSISTANTS


def problem_with_form(prompt: Any) -> str | None:
    """Finds what is wrong with the form of a prompt, which is text or a chat; None if nothing is."""
    if isinstance(prompt, str):
        return "prompt is a chat written as JSON; give the list of messages itself" if _is_written(prompt) else None
    if not isinstance(prompt, list):
        return f"prompt is neither text nor a list of messages: {quoted(prompt)}"
    if problem := problem_with_chat(prompt, "prompt"):
        return problem
    return None if any(map(_says_something, prompt)) else "prompt is empty: none of its messages says anything"


def problem_with_chat(chat: Chat, column: str) -> str | None:
    """Finds what is wrong with the form of a chat; None if nothing is."""
    for number, message in enumerate(chat, start=1):
        where = f"message {number} of the {column}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
            keys = f"; it has {', '.join(map(str, message))}" if isinstance(message, dict) and message else ""
            return f"{where} has no role: write {{role: …, content: …}}{keys}"
        if meant := _meant(message["role"]):
            return f"{where} has the role {quoted(message['role'])}; did you mean {meant!r}?"
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(map(_is_call, calls)):
            return f"{where}: tool_calls is no list of {{function: {{name: …, arguments: …}}}}: {quoted(calls)}"
        content = message.get("content")
        if (ids := message.get("ids")) is not None:
            if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
                return f"{where}: ids is no list of token ids: {quoted(ids)}"
            if not is_answer(message):
                return f"{where} has ids, which only the assistant's messages may have: others are rendered"
        if ids is None and not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            return f"{where} has no content: it must be text or a list of parts"
    return None


def _meant(role: str) -> str | None:
    """Finds the usual role whose spelling is nearest to an unusual one; None if none is near."""
    if role in _ROLES:
        return None
    return next(iter(get_close_matches(role.strip().lower(), _ROLES, n=1, cutoff=0.8)), None)


def _says_something(message: Message) -> bool:
    content = message.get("content")
    if isinstance(content, str):
        return bool(content.strip())
    return bool(message.get("tool_calls")) or any(not _is_blank(part) for part in content or ())


def _is_blank(part: Any) -> bool:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
    return isinstance(text, str) and not text.strip()


def _is_written(text: str) -> bool:
    """Tells whether a text is a list of messages in JSON, as tables without lists hold them."""
    try:
        return text.lstrip().startswith("[") and is_chat(json.loads(text))
    except (ValueError, RecursionError):
        return False


def _is_call(call: Any) -> bool:
    named = call.get("function") or call if isinstance(call, dict) else None
    return isinstance(named, dict) and isinstance(named.get("name"), str)


def from_messages(rows: Dataset) -> Dataset:
    """Cuts the column ``messages`` before the assistant's first: the prompt is what comes before it.

    The rest is the column ``completion``. Rows with a column ``prompt`` stay as they are.

    Raises:
        ValueError: there is a column ``completion`` already.
    """
    if "messages" not in rows.column_names or "prompt" in rows.column_names:
        return rows
    if "completion" in rows.column_names:
        raise ValueError("there are columns 'messages' and 'completion', and no 'prompt': map one with data.columns")
    chats, kind = rows["messages"][:], rows.features["messages"]
    starts = [next((i for i, m in enumerate(c) if is_answer(m)), None) if is_chat(c) else None for c in chats]
    turns = {
        "prompt": [chat if start is None else chat[:start] for chat, start in zip(chats, starts, strict=True)],
        "completion": [None if start is None else chat[start:] for chat, start in zip(chats, starts, strict=True)],
    }
    columns = [Dataset.from_dict({name: turns[name]}, features=Features({name: kind})) for name in turns]
    return concatenate_datasets([rows.remove_columns("messages"), *columns], axis=1)


def without_answers(rows: Dataset, keep: bool) -> Dataset:
    """Cuts prompts before their last turn where it is the assistant's; ``keep`` makes it the column ``completion``.

    Prompts that end otherwise stay as they are.

    Raises:
        ValueError: there is a column ``completion`` already.
    """
    if keep and "completion" in rows.column_names:
        raise ValueError("data.last_answer is completion, but there is a column 'completion' already")
    if "prompt" not in rows.column_names:
        return rows
    prompts = rows["prompt"][:]
    ends = [len(prompt) - 1 if is_chat(prompt) and is_answer(prompt[-1]) else None for prompt in prompts]
    turns = {"prompt": [prompt if end is None else prompt[:end] for prompt, end in zip(prompts, ends, strict=True)]}
    if keep:
        turns["completion"] = [None if end is None else prompt[end:] for prompt, end in zip(prompts, ends, strict=True)]
    kind = rows.features["prompt"]
    columns = [Dataset.from_dict({name: turns[name]}, features=Features({name: kind})) for name in turns]
    return concatenate_datasets([rows.remove_columns("prompt"), *columns], axis=1)
