"""Observations between two turns, as a chat template writes them: text, ids, and what a template must not do."""

from __future__ import annotations

from ...chat import Chat, Message
from ...printable import quoted
from ...trajectory import Example
from .messages import PLACEHOLDER, SHOWN
from .rendering import Renderer

THOUGHT = "<think>\nhm\n</think>\n\n"


def between(renderer: Renderer, example: Example, observation: str | Chat, role: str, stops: list[int]) -> list[int]:
    """Tokenizes what stands between the token that ended a turn and the next turn.

    Args:
        renderer: of the policy that reads it.
        example: whose prompt the conversation begins with.
        observation: text, or messages, whose texts follow one another where prompts are no chats.
        role: of text.
        stops: ids that end a turn.

    Raises:
        ValueError: the chat template ends a turn with none of the stop tokens.
    """
    if renderer.is_raw(example["prompt"]):
        if not isinstance(observation, str):
            observation = "\n".join(message["content"] for message in observation)
        return renderer.continuation(renderer.prompt(example), observation)
    mark = PLACEHOLDER
    while mark in str(observation):
        mark += "."
    messages = [{"role": role, "content": observation}] if isinstance(observation, str) else observation
    chat = [*renderer.messages(example["prompt"]), {"role": "assistant", "content": mark}, *messages]
    head, _, tail = renderer.render(chat, example, to_be_continued=True).rpartition(mark)
    ids = renderer.continuation(head + mark, tail)
    end = next((i for i, token in enumerate(ids, 1) if token in stops), None)
    if end is None:
        raise ValueError(
            f"the chat template of {renderer.tokenizer.name_or_path} ends a turn within a conversation with none of "
            "the stop tokens"
        )
    return ids[end:]


def check_observations(renderer: Renderer, role: str, stops: list[int]) -> None:
    """Refuses chat templates with which an episode would not hold what was sampled.

    Raises:
        ValueError: the template does not write observations of this role, or leaves out or rewrites what the assistant
            wrote in an earlier turn.
    """
    if renderer.processor.chat_template is None or renderer.raw:
        return
    # 1. an observation is written
    name, row = renderer.tokenizer.name_or_path, {"prompt": [{"role": "user", "content": "?"}]}
    try:
        one, other = (between(renderer, row, text, role, stops) for text in ("1", "2"))
    except Exception as error:  # a template may refuse any chat
        raise ValueError(
            f"model.environment: {name} can't go on behind an observation of the role {role!r}: {error}"
        ) from error
    if one == other:
        raise ValueError(
            f"model.environment: the chat template of {name} writes nothing of what the role {role!r} says"
        )
    # 2. earlier turns stay as they were sampled
    thinks = "think" in str(renderer.processor.chat_template) and renderer.options.get("enable_thinking") is not False
    text = f"{THOUGHT if thinks else ''}{PLACEHOLDER} <call>1</call>"
    turns: list[Message] = [{"role": "assistant", "content": text}, {"role": role, "content": "1"}]
    prompt = renderer.prompt(row)
    sampled = text.removeprefix("<think>\n") if prompt.endswith("<think>\n") else text
    rendered = renderer.render([*row["prompt"], *turns], row, to_be_continued=True)
    if sampled not in rendered:
        after = rendered.removeprefix(renderer.render(row["prompt"], row))
        raise ValueError(
            f"model.environment: the chat template of {name} leaves out or rewrites what an earlier turn wrote, so "
            f"that a conversation would not hold what was sampled. Turn 1 wrote {quoted(sampled, SHOWN)}; behind an "
            f"observation of the role {role!r} the template writes {quoted(after, SHOWN)}. Switch thinking off "
            "(model.chat_template_kwargs: {enable_thinking: false}), or take a template that keeps it"
        )
