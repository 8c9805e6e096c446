"""Tools: an environment of plain functions, which a policy calls in the format of its chat template."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from PIL import Image
from transformers.utils import get_json_schema

from ...chat import Chat
from ...environment import Environment, Turn
from ...imported import import_callable
from ...printable import quoted
from ...trajectory import Example
from .messages import SHOWN
from .rendering import Renderer

TAGS = ("<tool_call>", "</tool_call>")
NAME, VALUE = "name_of_a_tool", "value_of_it"
KINDS: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


class Tools(Environment):
    """Environment of plain functions. A turn without a call ends the episode: it is the answer.

    A call is JSON with a name and arguments between two tags, those of the model's chat template, or is read by the
    tokenizer's ``response_template`` where it has one (transformers' `parse_response`); several in a turn are answered
    in their order. A call that is malformed, of an unknown function, or with arguments that don't fit gets an error as
    its answer, which the policy reads. The functions are called in the trainer's process, within
    ``rollout.turn_timeout``: what runs programs of a model belongs into a process of its own, as `Calculator` has it.

    Args:
        functions: dotted paths of functions with type hints and a docstring that has ``Args:``, from which their JSON
            schemas are made (`transformers.utils.get_json_schema`). What they return is text, a PIL image or a list in
            which there are some (for settings that have eyes), or becomes JSON.
        tags: before and behind a call. Default: as the chat template writes calls, or ``<tool_call>`` where it writes
            none.
        response_template: reads calls in any other format, as transformers' tokenizers have it. Default: the
            tokenizer's own, if it has one and no ``tags`` are set.
        describe: have the chat template tell policies of the functions (its ``tools``). Without it prompts should.

    Raises:
        ValueError: no function, one that can't be imported or described, or two of the same name; tags beside a
            response template; when models are loaded: calls can't be read as the chat template writes them.
    """

    role = "tool"

    def __init__(
        self,
        functions: list[str],
        tags: list[str] | None = None,
        describe: bool = True,
        response_template: dict[str, Any] | None = None,
    ) -> None:
        if tags is not None and response_template is not None:
            raise ValueError("Tools: calls are read by tags or by a response_template; set one of them")
        self.functions, self.tags, self.describe = functions, tags, describe
        self.response_template = response_template
        self._use([import_callable(path, "Tools.functions") for path in functions])

    def _use(self, functions: Sequence[Callable[..., Any]]) -> None:
        if not functions:
            raise ValueError("Tools.functions is empty: name at least one function")
        if self.tags is not None and (len(self.tags) != 2 or not self.tags[0]):
            raise ValueError(f"Tools.tags are {self.tags}; they must be two: what is before and behind a call")
        self._parse: Callable[[str], dict[str, Any]] | None = None
        self._schemas: dict[str, dict[str, Any]] = {}
        self._functions: dict[str, Callable[..., Any]] = {}
        for function in functions:
            try:
                schema = get_json_schema(function)
            except Exception as error:  # of whatever it does not understand
                raise ValueError(f"Tools.functions: {quoted(function)} can't be described: {error}") from error
            name = schema["function"]["name"]
            if name in self._schemas:
                raise ValueError(f"Tools.functions: two functions are called {name!r}")
            self._schemas[name], self._functions[name] = schema, function
        self._tags: tuple[str, ...] = tuple(self.tags or TAGS)
        if self.describe:
            self.options = {"tools": list(self._schemas.values())}

    def reset(self, row: Example, seed: int) -> Any:
        return {"calls": 0}

    def step(self, state: Any, text: str) -> Turn:
        calls = self._calls(text)
        if not calls:
            return Turn(state=state, done=True)
        answers: Chat = [{"role": "tool", "content": self.called(call)} for call in calls]
        return Turn(answers, {"calls": state["calls"] + len(calls)})

    def _calls(self, text: str) -> list[Any]:
        """Reads the calls in a turn, or an error where one is malformed."""
        if self._parse is None:
            return read_calls(text, self._tags)
        try:
            return list(self._parse(text).get("tool_calls") or ())
        except Exception as error:  # of whatever a model wrote
            return [error]

    def called(self, call: Any) -> str | list[Any]:
        """Calls a function, as a policy asked for it; returns its answer, or what is wrong with the call."""
        if isinstance(call, Exception):
            return f"error: the call can't be read: {call}"
        asked: Any = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(asked, dict) or not isinstance(name := asked.get("name"), str):
            return 'error: a call is {"name": …, "arguments": {…}}'
        if name not in self._functions:
            return f"error: there is no tool {name!r}; there are {', '.join(self._functions)}"
        arguments: Any = asked.get("arguments", asked.get("parameters", {}))
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            if (problem := problem_with_arguments(self._functions[name], self._schemas[name], arguments)) is not None:
                return f"error: {name}: {problem}"
            return content_of(self._functions[name](**arguments))
        except Exception as error:
            return f"error: {type(error).__name__}: {error}"

    def adopt(self, renderer: Renderer) -> None:
        """Takes over how calls are written, by the tokenizer's response template or the tags of its chat template.

        Raises:
            ValueError: the chat template writes calls in a format that is not read here.
        """
        if self.tags is not None:
            return
        if renderer.processor.chat_template is None or renderer.raw or not renderer.reads("tool_calls"):
            if self.response_template is not None:
                raise ValueError(
                    "model.environment: response_template reads calls as the chat template of "
                    f"{renderer.tokenizer.name_or_path} writes them, and that writes none; set tags"
                )
            return
        # 1. a call, as the chat template writes it behind a question
        call = {"type": "function", "function": {"name": NAME, "arguments": {"of_it": VALUE}}}
        question = [{"role": "user", "content": "?"}]
        row = {"prompt": question}
        try:
            asked = renderer.render(question, row, to_be_continued=True)
            turn = renderer.render([*question, {"role": "assistant", "content": "", "tool_calls": [call]}], row)
        except Exception as error:  # a template may refuse any chat
            raise ValueError(f"model.environment: {renderer.tokenizer.name_or_path} writes no call: {error}") from error
        turn = turn.removeprefix(asked)
        for token in renderer.tokenizer.all_special_tokens:
            turn = turn.removesuffix("\n").removesuffix(token)
        # 2. read back
        template = self.response_template
        if template is None:
            template = getattr(renderer.tokenizer, "response_template", None)
        written = f"the chat template of {renderer.tokenizer.name_or_path} writes a call as {quoted(turn, SHOWN)}"
        if template is not None:
            schemas = list(self._schemas.values())
            self._parse = partial(renderer.tokenizer.parse_response, schema=template, prefix=asked, tools=schemas)
            calls = self._calls(turn)
            if len(calls) != 1 or not isinstance(calls[0], dict) or calls[0].get("function") != call["function"]:
                raise ValueError(
                    f"model.environment: {written}, which the response template reads as {quoted(calls, SHOWN)}"
                )
            return
        if (tags := tags_around(turn)) is None:
            raise ValueError(
                f"model.environment: {written}, which is no JSON with a name and arguments between two tags. Set "
                "response_template, which says how it is read; or describe calls in the prompt, and say how they are "
                "written: tags: ['<tool_call>', '</tool_call>'], describe: false"
            )
        self._tags = tags


def content_of(value: Any) -> str | list[Any]:
    """Returns what a function returned as the content of a message: text, or parts where there are images."""
    if isinstance(value, Image.Image):
        return [{"type": "image", "image": value}]
    if isinstance(value, list | tuple) and any(isinstance(item, Image.Image) for item in value):
        contents = [content_of(item) for item in value]
        return [p for c in contents for p in (c if isinstance(c, list) else [{"type": "text", "text": c}])]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def tags_around(turn: str) -> tuple[str, str] | None:
    """Finds what a template writes before and behind a call of `NAME`; None where the call is not JSON."""
    for i, character in enumerate(turn):
        if character in "{[":
            try:
                value, end = json.JSONDecoder().raw_decode(turn, i)
            except ValueError:
                continue
            call = value[0] if isinstance(value, list) and value else value
            if isinstance(call, dict) and call.get("name") == NAME and VALUE in json.dumps(call):
                return turn[:i].strip(), turn[end:].strip()
    return None


def read_calls(text: str, tags: tuple[str, ...]) -> list[Any]:
    """Reads the calls in a text: JSON behind each opening tag, or an error where it is none.

    Without an opening tag a text that begins with JSON is a call, or a list of them.
    """
    before, behind = tags
    parts = text.split(before)[1:] if before else [text] if text.lstrip()[:1] in ("{", "[") else []
    calls: list[Any] = []
    for part in parts:
        try:
            value, _ = json.JSONDecoder().raw_decode((part.split(behind)[0] if behind else part).strip())
        except (ValueError, RecursionError) as error:
            value = error
        # an empty list is a malformed call, and no answer
        calls += value if isinstance(value, list) and value else [value]
    return calls


def problem_with_arguments(function: Callable[..., Any], schema: dict[str, Any], arguments: Any) -> str | None:
    """Finds what is wrong with the arguments of a call; None if nothing is."""
    if not isinstance(arguments, dict):
        return f"arguments are {quoted(arguments)}; they must be an object"
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        return str(error)
    for name, value in arguments.items():
        kind = schema["function"]["parameters"]["properties"].get(name, {}).get("type")
        kinds = KINDS.get(kind) if isinstance(kind, str) else None
        if kinds is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and kind != "boolean")):
            return f"{name} is {quoted(value)}; it must be of the type {kind}"
    return None


def calls(completion: str, example: Example) -> float:
    """Counts the calls between ``<tool_call>`` tags of an episode, malformed ones among them: a metric for
    ``evaluation.metrics``."""
    return float(example["conversation"].count(TAGS[0]))


def malformed(completion: str, example: Example) -> float:
    """Counts the calls of an episode that were answered by an error: a metric for ``evaluation.metrics``."""
    return float(example["conversation"].count("error: "))
