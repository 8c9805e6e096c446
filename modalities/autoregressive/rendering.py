"""Rendering of rows as text and token ids: prompts, given completions, views and replay.

A completion's ids are those that follow its prompt's. Wherever the chat template permits it, both together are
the ids of the whole conversation, as far as the student writes it: up to the token that ends its last turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from jinja2 import UndefinedError

from ...chat import Chat, Message, is_answer, problem_with_chat
from ...printable import quoted
from ...rows import reason_of
from ...trajectory import Example
from .messages import (
    PLACEHOLDER,
    as_sampled,
    holds,
    options_of,
    parting,
    plain,
    sampled_ids,
    saying_otherwise,
    shown_text,
    text_only,
    tools_of,
    with_contents,
    without_opening,
)
from .models import tokenizer_of

COLUMNS = frozenset({"prompt", "completion", "completion_ids", "tools", "chat_template_kwargs"})
"""Columns of a row that are read."""

_OURS = {"add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages", "tokenize"}


@dataclass(frozen=True)
class Renderer:
    """Renderer of rows for policies with this tokenizer and this chat template.

    Args:
        processor: a tokenizer, or a processor that has one.
        options: for the chat template. Those of a row, in its column ``chat_template_kwargs``, go before them, and so
            do the tools in its column ``tools`` (a list of JSON schemas, or the same as JSON text).
        raw: text prompts stay as they are, even where there is a chat template.
        prepare: from a chat, with the row that it belongs to, to the form that the template reads.
    """

    processor: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False
    prepare: Callable[[Chat, Example], Chat] = text_only

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.processor)

    # -- prompts ------------------------------------------------------------------------------------------------

    def prompt(self, example: Example) -> str:
        """Renders the prompt as text, which the policy continues.

        Raises:
            ValueError: a chat, or tools, without a chat template to render them; an answer at the chat's end; something
                that the template does not write.
        """
        prompt = example["prompt"]
        if self.is_raw(prompt):
            for name, there in (("tools", tools_of(example)), ("chat_template_kwargs", options_of(example))):
                if there:
                    raise ValueError(f"the row has {name}, which nothing shows: {self._why_raw()}")
            return str(prompt)
        chat = self.messages(prompt)
        if is_answer(chat[-1]):
            raise ValueError(
                "the prompt's last message is the assistant's: the answer would be read, and a second one asked for. "
                "data.last_answer: drop leaves it out, completion makes it the column completion"
            )
        text = self.render(chat, example, to_be_continued=True)
        self._check_written(text, chat, example)
        return text

    def prompt_ids(self, example: Example) -> list[int]:
        """Tokenizes the prompt: with one beginning-of-sequence token, and no end.

        Raises:
            ValueError: as in `prompt`.
        """
        text = self.prompt(example)
        # a rendered chat holds its own beginning-of-sequence token already
        return self._opened(text) if self.is_raw(example["prompt"]) else self._ids(text)

    def _opened(self, text: str) -> list[int]:
        """Tokenizes a text with the tokenizer's tokens before it, and without those behind it."""
        plain, closed = self._ids(text), list(self.tokenizer(text)["input_ids"])
        if not plain or plain[0] == self.tokenizer.bos_token_id:
            return plain
        starts = (i for i in range(len(closed)) if closed[i : i + len(plain)] == plain)
        return closed[: next(starts, len(closed)) + len(plain)]

    def rendered_already(self, example: Example, stops: list[int]) -> str | None:
        """Finds the end of a turn within a message, which was then rendered before; None: there is none."""
        prompt = example["prompt"]
        if self.is_raw(prompt):
            return None
        texts = [shown_text(message) for message in self.messages(prompt)]
        ends = [token for token, i in self.tokenizer.get_added_vocab().items() if i in stops]
        return next((end for end in ends if any(end in text for text in texts)), None)

    # -- completions --------------------------------------------------------------------------------------------

    def completion(self, example: Example, stops: list[int]) -> tuple[list[int], list[bool]]:
        """Tokenizes the column ``completion`` behind the prompt, and marks the tokens that the assistant writes.

        The last of them is the token that ends the assistant's turn.

        Args:
            example: its completion is text, or messages: the assistant's first and last, others between them. What a
                message has as ``ids``, which a policy sampled, stands there as it is.
            stops: ids that end a turn.

        Raises:
            ValueError: as in `prompt`; the completion is something else, or the template writes it in another way.
        """
        ids: list[int] = []
        written: list[bool] = []
        before = self.prompt(example)
        example = {**example, "completion": with_contents(example["completion"], self.tokenizer.decode, stops)}
        turns, sampled = self._turns(before, example), sampled_ids(example["completion"])
        for number, turn in enumerate(turns, 1):
            new = self.continuation(before, turn)
            end = next((i for i, token in enumerate(new, 1) if token in stops), None)
            if number == len(turns):
                new = [*new, self.stop(example, stops)] if end is None else self._cut(new, end)
                end = len(new)
            elif end is None:
                raise ValueError("the chat template ends a turn within the completion with none of the stop tokens")
            if (given := sampled[number - 1]) is not None:
                new, end = as_sampled(given, new, end, stops, number, self.tokenizer)
            ids, written = ids + new, written + [index < end for index in range(len(new))]
            before += turn
        return ids, written

    def continuation(self, before: str, text: str) -> list[int]:
        """Tokenizes a text that follows another one: its first token begins no sequence and no word."""
        return self._behind(before, text)[1]

    def offsets(self, before: str, text: str) -> list[tuple[int, int]]:
        """Lists the characters of a text, first and behind the last, that each token of its `continuation` is made of.

        Raises:
            NotImplementedError: the tokenizer doesn't tell.
        """
        context, ids = self._behind(before, text)
        encoded = self.tokenizer(context + text, add_special_tokens=False, return_offsets_mapping=True)
        told = encoded["offset_mapping"][len(encoded["input_ids"]) - len(ids) :]
        return [(start - len(context), stop - len(context)) for start, stop in told]

    def _behind(self, before: str, text: str) -> tuple[str, list[int]]:
        """Tokenizes a text behind another one, or behind the first of others that its tokens don't reach into."""
        # where a token would reach across the border, any other text before it will do
        for context in (before, "\n", "a"):
            head, ids = self._ids(context), self._ids(context + text)
            if ids[: len(head)] == head:
                return context, ids[len(head) :]
        return "", self._ids(text)

    def space(self, example: Example) -> str:
        """Returns the white space that the chat template writes between the prompt and an answer, usually none."""
        if self.is_raw(example["prompt"]):
            return ""
        prompt, chat = self.prompt(example), self.messages(example["prompt"])
        answered = self.render([*chat, {"role": "assistant", "content": PLACEHOLDER}], example)
        between = answered.rpartition(PLACEHOLDER)[0].removeprefix(prompt)
        return between if between.isspace() else ""

    def turn_end(self, stops: list[int]) -> int | None:
        """Finds the id with which the chat template ends the assistant's turn; None: with none of its own.

        Args:
            stops: ids that are known to end a turn.
        """
        if self.processor.chat_template is None:
            return None
        chat, row = [{"role": "user", "content": PLACEHOLDER}], {"prompt": PLACEHOLDER}
        try:
            behind = self._behind_answer(chat, row)
            asked_again = self._behind_answer(chat, row, {"role": "user", "content": "?"})
        except Exception:  # a template may refuse any chat, and then rows say it better
            return None
        last, between = self._ids(behind), self._ids(asked_again)
        both = [one for one, other in takewhile(lambda pair: pair[0] == pair[1], zip(last, between, strict=False))]
        added = {i for token, i in self.tokenizer.get_added_vocab().items() if token.strip()}
        for candidates in (both, last):  # the last turn may close the conversation, too
            if ends := [i for i in candidates if i in stops] or [i for i in reversed(candidates) if i in added]:
                return ends[0]
        # some templates leave the end to the next turn's beginning
        return next((i for i in between if i in stops), None)

    def _turns(self, prompt: str, example: Example) -> list[str]:
        """Renders the text behind the prompt, cut where the assistant begins to write."""
        # 1. refusals, and raw text
        completion = example["completion"]
        if not isinstance(completion, str | list):
            raise ValueError(f"completion is neither text nor a list of messages: {quoted(completion)}")
        if self.is_raw(example["prompt"]):
            if not isinstance(completion, str):
                raise ValueError(f"the completion is a chat, but {self._why_raw()}; give text")
            return [completion]
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        if problem := problem_with_chat(answer, "completion"):
            raise ValueError(problem)
        places = [i for i, message in enumerate(answer) if message["role"] == "assistant"]
        if not places or places[0] != 0 or places[-1] != len(answer) - 1:
            raise ValueError("the completion's first and last message must be the assistant's")
        # 2. the conversation, cut at the prompts of all turns
        chat = self.messages(example["prompt"])
        conversation = self.render(chat + answer, example)
        self._check_written(conversation, chat + answer, example, given=len(chat))
        later = [self.render(chat + answer[:i], example, to_be_continued=True) for i in places[1:]]
        starts = [prompt if conversation.startswith(prompt) else self._asked(prompt, chat, example), *later]
        turns = [
            conversation[len(start) : len(stop)]
            for start, stop in zip(starts, [*later, conversation], strict=True)
            if conversation.startswith(start)
        ]
        # 3. compared with the messages
        opening = self._opening(prompt, chat, example)
        messages = [answer[i] for i in places]
        if len(turns) == len(messages) and all(map(holds, [opening + turn for turn in turns], messages)):
            return turns
        (first, *rest) = map(plain, answer)
        if rest or first.keys() != {"role", "content"} or not isinstance(first["content"], str):
            where = parting(conversation, starts, messages, opening)
            raise ValueError(f"the chat template does not write the whole completion behind the prompt: {where}")
        # such as reasoning that the template leaves out of answers, or begins itself
        return [without_opening(first["content"], opening) + self._behind_answer(chat, example)]

    def _asked(self, prompt: str, chat: Chat, example: Example) -> str:
        """Renders the prompt as it is where an answer follows, if that ends alike; otherwise returns the prompt itself.

        They differ for Mistral's templates, which write the system message in the last message alone.
        """
        head = self.render([*chat, {"role": "assistant", "content": PLACEHOLDER}], example).rpartition(PLACEHOLDER)[0]
        tail = prompt[len(prompt.rstrip()) :]
        before, end, space = head.rpartition(prompt.split()[-1]) if prompt.strip() else ("", "", head)
        return before + end + tail if end and not space.strip() and space.startswith(tail) else prompt

    def _opening(self, prompt: str, chat: Chat, example: Example) -> str:
        """Returns the beginning of an answer that the template writes at the end of the prompt."""
        asked = self.render(chat, example)
        return prompt[len(asked) :] if prompt.startswith(asked) else ""

    def _behind_answer(self, chat: Chat, example: Example, *then: Message) -> str:
        """Returns the template's text behind an answer, up to the content of the message that follows, if any."""
        conversation = self.render([*chat, {"role": "assistant", "content": PLACEHOLDER}, *then], example)
        behind = conversation.rpartition(PLACEHOLDER)[2]
        return behind.partition(then[0]["content"])[0] if then else behind

    def _cut(self, ids: list[int], end: int) -> list[int]:
        """Cuts the ids of a last turn at its stop token, behind which a template may write a line break."""
        if self.tokenizer.decode(ids[end:], skip_special_tokens=True).strip():
            raise ValueError(
                f"the completion goes on behind the stop token {self.tokenizer.decode(ids[end - 1 : end])!r}, "
                "behind which the student would write nothing"
            )
        return ids[:end]

    def stop(self, example: Example, stops: list[int]) -> int:
        """Returns the id that ends an answer to the row; ``stops``: those that may."""
        template_end = None if self.is_raw(example["prompt"]) else self.turn_end(stops)
        usual = self.tokenizer.eos_token_id
        return next(token for token in (template_end, usual, stops[0]) if token is not None)

    # -- the template -------------------------------------------------------------------------------------------

    def check_options(self, key: str) -> None:
        """Refuses options that nothing reads.

        Raises:
            ValueError: an option that the template never reads.
        """
        for name in self.options:
            if name in _OURS:
                raise ValueError(f"{key}: {name} is set by the setting itself")
            if not self.reads(name):
                model = self.tokenizer.name_or_path
                has_none = self.processor.chat_template is None
                whose = f"{model} has no chat template that" if has_none else f"the chat template of {model}"
                raise ValueError(f"{key}: {whose} reads {'' if has_none else 'no '}{name!r}")

    def render(self, chat: Chat, example: Example, to_be_continued: bool = False) -> str:
        """Renders a chat as text, with the options and tools of a row."""
        # 1. what the template is given, and has to read
        options = {**self.options, **self._own_options(example)}
        if tools := tools_of(example):
            options["tools"] = tools
        given = {name: any(message.get(name) for message in chat) for name in ("tool_calls", "function_call")}
        for name, there in {"tools": tools, **given}.items():
            if there and not self.reads(name):
                raise ValueError(
                    f"the row has {name}, which the chat template of {self.tokenizer.name_or_path} does not write"
                )
        # 2. its text
        prepared = self.prepare([plain(message) for message in chat], example)
        try:
            text = self.processor.apply_chat_template(
                prepared, tokenize=False, add_generation_prompt=to_be_continued, **options
            )
        except (UndefinedError, TypeError) as error:
            if not tools:
                raise
            raise ValueError(
                f"the column tools holds what the chat template of {self.tokenizer.name_or_path} can't write "
                f"({reason_of(error)}): {quoted(tools)}. Most take {{type: function, function: {{name: …, "
                "description: …, parameters: …}}"
            ) from error
        return str(text)

    def _check_written(self, text: str, chat: Chat, example: Example, given: int | None = None) -> None:
        """Refuses messages whose text the template does not write.

        Args:
            text: the chat as the template writes it.
            chat: of which the messages from ``given`` on are the completion's.
            example: the row that it belongs to.
            given: default: none is, and the prompt's are checked. Beside a completion a template may leave some out.

        Raises:
            ValueError: the template writes the same whatever one of the messages says.
        """
        written, begin = "".join(text.split()), given or 0
        for index, message in list(enumerate(chat))[begin:]:
            # templates may leave out thoughts, and what is said beside a call
            if holds(written, message) or message.get("tool_calls"):
                continue
            try:
                changed = [*chat[:index], saying_otherwise(message), *chat[index + 1 :]]
                lost = self.render(changed, example, to_be_continued=given is None) == text
            except Exception:  # what they refuse they read
                lost = False
            if lost:
                column = "prompt" if given is None else "completion"
                raise ValueError(
                    f"message {index + 1 - begin} of the {column} has the role {quoted(message['role'])}, and the chat "
                    f"template of {self.tokenizer.name_or_path} writes nothing of what it says: nobody would read it. "
                    "Give it a role that the template writes"
                )

    def _own_options(self, example: Example) -> dict[str, Any]:
        options = options_of(example)
        for name in options:
            if name in _OURS or not self.reads(name):
                why = "is set by the setting itself" if name in _OURS else "is read by no part of the chat template"
                raise ValueError(f"chat_template_kwargs of the row: {name} {why}")
        return options

    def reads(self, name: str) -> bool:
        """Tells whether the chat template reads an option or a key of messages."""
        template: Any = self.processor.chat_template
        if isinstance(template, dict):  # several by name, of which the one for tools is taken where there are any
            template = " ".join(template.values())
        return template is not None and re.search(rf"\b{re.escape(name)}\b", template) is not None

    def messages(self, prompt: str | Chat) -> Chat:
        """Returns the messages of a prompt."""
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}]
        if self.processor.chat_template is None:
            raise ValueError(f"the prompt is a chat but {self._why_raw()}; give string prompts")
        return prompt

    def is_raw(self, prompt: str | Chat) -> bool:
        """Tells whether a prompt is read as it is, without a template."""
        return isinstance(prompt, str) and (self.raw or self.processor.chat_template is None)

    def _why_raw(self) -> str:
        has_none = self.processor.chat_template is None
        return f"{self.tokenizer.name_or_path} has no chat template" if has_none else "model.raw_prompts is set"

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
