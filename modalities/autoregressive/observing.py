"""Observations between two turns, as a chat template writes them: text, ids, and what a template must not do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...chat import Chat, Message, is_chat
from ...environment import Environment
from ...printable import quoted
from ...teacher import Elsewhere
from ...trajectory import Example
from .messages import PLACEHOLDER, SHOWN, text_only
from .rendering import Renderer

THOUGHT = "<think>\nhm\n</think>\n\n"


@dataclass(frozen=True)
class Heard:
    """Observation between two turns, as a policy reads it.

    Attributes:
        ids: tokens.
        values: what is more than tokens, with the index ``at`` of the first of its tokens (`Trajectories.observed`).
    """

    ids: list[int] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)


class Given(NamedTuple):
    """Completion of a row: its tokens, which of them the policy writes, and what else it observes (`Heard.values`)."""

    ids: list[int]
    written: list[bool]
    observed: list[dict[str, Any]] = []  # noqa: RUF012

    @property
    def own(self) -> list[int]:
        """Tokens that the policy writes."""
        return [i for i, is_written in zip(self.ids, self.written, strict=True) if is_written]


def between(
    renderer: Renderer, example: Example, observation: str | list[Any], role: str, stops: list[int]
) -> list[int]:
    """Tokenizes what stands between the token that ended a turn and the next turn.

    Args:
        renderer: of the policy that reads it.
        example: whose prompt the conversation begins with.
        observation: text, parts, or messages, whose texts follow one another where prompts are no chats.
        role: of what is no message.
        stops: ids that end a turn.

    Raises:
        ValueError: the chat template ends a turn with none of the stop tokens.
    """
    messages = as_messages(observation, role)
    if renderer.is_raw(example["prompt"]):
        texts = [message["content"] for message in text_only(messages, example)]
        return renderer.continuation(renderer.prompt(example), "\n".join(texts))
    mark = PLACEHOLDER
    while mark in str(observation):
        mark += "."
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


def as_messages(observation: str | list[Any], role: str) -> Chat:
    """Returns the messages of an observation; ``role``: of what is none."""
    if isinstance(observation, list) and is_chat(observation):
        return observation
    return [{"role": role, "content": observation}]


def check_shown(module: Any, environment: Environment) -> None:
    """Refuses an environment that shows more than text where somebody would not see it.

    Raises:
        ValueError: policies don't read it; a student view, or a teacher that is elsewhere, beside it.
    """
    if not environment.shows:
        return
    what = " and ".join(f"{kind}s" for kind in sorted(environment.shows))
    if environment.shows - module.observes:
        raise ValueError(
            f"model.environment: {type(environment).__name__} shows {what}, which policies of {type(module).__name__} "
            "don't read; take a setting that has eyes"
        )
    if module.student_view is not None:
        raise ValueError(
            f"model.student_view: it is shown rows alone, and the {what} of model.environment would be seen as they "
            "are; leave one of them out"
        )
    for name, teacher in module.teachers.items():
        if isinstance(teacher.weights, Elsewhere):
            raise ValueError(
                f"model.teachers.{name}: {type(teacher.weights).__name__} is told of rows and steps, and not of the "
                f"{what} that model.environment shows"
            )


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
