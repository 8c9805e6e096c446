"""EndpointReward: a reward that a chat endpoint gives, in JSON that is parsed strictly."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from .asked import Reply
from .chat import Chat
from .endpoint import BudgetSpent, Endpoint
from .heart import HEART
from .policy import View, shown_by
from .printable import quoted
from .progress import phase
from .reward import Example, Reward

FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


class Unreadable(ValueError):
    """An answer that is not what was asked for."""


class Verdict(NamedTuple):
    """Verdict on a completion: its reward, and words on it where there are any."""

    reward: float
    words: str | None = None


class EndpointReward(Reward):
    """Reward that a model behind a chat endpoint gives, in JSON.

    All completions of a generation batch are asked about at once (`Endpoint.at_once` at a time). The endpoint has time
    limits of its own, so ``scoring.timeout`` does not hold.

    Args:
        endpoint: who is asked.
        view: what it reads, from the columns of the row and ``written``, the completion: a prompt of text or messages.
            Where it shows nothing, the reward abstains.
        unreadable: what an answer is worth that is not what was asked for: None for the row (``abstain``, default), or
            the end of the run (``stop``). Either way it is counted.
        temperature: of the answer. Default 0.
        max_tokens: of the answer. Default 1024 (ours).
        structured: whether the answer's JSON schema is sent as ``response_format``, which OpenAI, vLLM and llama.cpp
            know; a server that refuses it needs False. Default True.

    Raises:
        ValueError: another word than abstain or stop, or no room for an answer.
        BudgetSpent: nothing more may be asked; ``scoring.on_failure`` has no say in it.
    """

    timed = False

    def __init__(
        self,
        endpoint: Endpoint,
        view: View,
        unreadable: Literal["abstain", "stop"] = "abstain",
        temperature: float | None = 0.0,
        max_tokens: int | None = 1024,
        structured: bool = True,
    ) -> None:
        who = type(self).__name__
        if unreadable not in ("abstain", "stop"):
            raise ValueError(f"{who}.unreadable is {unreadable!r}; it must be 'abstain' or 'stop'")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"{who}.max_tokens is {max_tokens}; it must be at least 1, or null for the server's own")
        self.endpoint, self.view, self.unreadable = endpoint, view, unreadable
        self.temperature, self.max_tokens, self.structured = temperature, max_tokens, structured
        self.columns = tuple(column for column in view.columns if column != "written")
        self.failures: Counter[str] = Counter()
        self._read = 0
        self._ahead: dict[str, Future[Reply]] = {}

    @abstractmethod
    def schema(self, example: Example) -> dict[str, Any]:
        """Returns the JSON schema of the answer about a row."""

    @abstractmethod
    def verdict(self, answer: str, example: Example) -> Verdict:
        """Reads an answer.

        Raises:
            Unreadable: it is not what was asked for.
        """

    def question(self, completion: str, example: Example) -> Chat | None:
        """Returns the messages that are sent; None where the view shows nothing."""
        # an empty column would show nothing, and an empty completion is to be judged, too
        row = {**example, "written": completion or " "}
        seen_row = shown_by(self.view, row, f"{type(self).__name__}.view")
        return None if seen_row is None else messages_of(seen_row["prompt"])

    def ahead(self, completions: Sequence[str], examples: Sequence[Example]) -> None:
        self._ahead = {}
        for pair in zip(completions, examples, strict=True):
            with suppress(ValueError):  # it comes again when this one is asked for, and is told with its row then
                if (question := self.question(*pair)) is not None:
                    self._submit(question, pair[1])
        await_all(self.endpoint, list(self._ahead.values()))

    def __call__(self, completion: str, example: Example) -> float | None:
        verdict = self._judge(completion, example)
        return None if verdict is None else verdict.reward

    def feedback(self, completion: str, example: Example) -> str | None:
        verdict = self._judge(completion, example)
        return None if verdict is None else verdict.words

    def measured(self) -> dict[str, float]:
        measured = {"unreadable": self.failures["unreadable"] / max(self._read, 1)}
        tokens, money = self.endpoint.spent()
        return measured | {"tokens": float(tokens), "money": money}

    def close(self) -> None:
        """Waits for no answer any more."""
        self.endpoint.close()

    def _submit(self, question: Chat, example: Example) -> Future[Reply]:
        key = json.dumps(question)
        if key not in self._ahead:
            self._ahead[key] = self.endpoint.ask(
                question,
                temperature=self.temperature,
                max_tokens=self.max_tokens,
                response_format=response_format(type(self).__name__, self.schema(example)) if self.structured else None,
            )
        return self._ahead[key]

    def _judge(self, completion: str, example: Example) -> Verdict | None:
        question = self.question(completion, example)
        if question is None:
            return None
        reply = self._submit(question, example).result()
        self._read += 1
        try:
            return self.verdict(reply.text, example)
        except Unreadable as error:
            self.failures["unreadable"] += 1
            if self.unreadable == "stop":
                cut = " (it was cut at max_tokens)" if reply.cut else ""
                raise Unreadable(
                    f"{self.endpoint.url} answered {quoted(reply.text, 200)}{cut}: {error}; with unreadable: abstain "
                    f"such rows count nowhere ({type(self).__name__})"
                ) from None
            return None


def endpoint_for(own: Endpoint | None, module: Any, who: str) -> Endpoint:
    """Returns the endpoint of a part: its own, or that of the run's reward.

    Raises:
        ValueError: there is neither.
    """
    endpoint = own or getattr(module.reward, "endpoint", None)
    if not isinstance(endpoint, Endpoint):
        raise ValueError(f"{who}.endpoint is not set, and model.reward asks none that could be meant")
    return endpoint


def await_all(endpoint: Endpoint, futures: Sequence[Future[Reply]]) -> None:
    """Waits until all is answered, or failed.

    Raises:
        BudgetSpent: at the first that the budget has no room for.
    """
    with phase(f"answers of {endpoint.url}", len(futures)) as progress, HEART.waiting_for("server"):
        for future in futures:
            if isinstance(error := future.exception(), BudgetSpent):
                raise error
            progress.done += 1


def replies_to(endpoint: Endpoint, futures: Sequence[Future[Reply]]) -> list[Reply]:
    """Waits for all answers.

    Raises:
        BudgetSpent, ConnectionError, ValueError: one failed (`Endpoint.ask`).
    """
    await_all(endpoint, futures)
    return [future.result() for future in futures]


def object_schema(**properties: Any) -> dict[str, Any]:
    """Writes the JSON schema of an object with these keys, all of them and no others."""
    names = [*properties]
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def response_format(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Writes a JSON schema as a ``response_format``."""
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}


def messages_of(prompt: Any) -> Chat:
    """Converts a prompt to messages of text.

    Raises:
        ValueError: a part of it is no text, which the endpoint would never see.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    for message in messages:
        content = message["content"]
        if not isinstance(content, str) and any(part.get("type") != "text" for part in content):
            raise ValueError("an endpoint is sent text alone, and the prompt holds something else, such as an image")
    return [{"role": m["role"], "content": _joined(m["content"])} for m in messages]


def read_object(answer: str, keys: Sequence[str]) -> dict[str, Any]:
    """Parses an answer that is one JSON object with these keys, in a code fence or not, and nothing else.

    Raises:
        Unreadable: it is something else.
    """
    fenced = FENCE.fullmatch(answer)
    try:
        value = json.loads(fenced[1] if fenced else answer, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"it is no JSON ({error})") from None
    if not isinstance(value, dict) or set(value) != set(keys):
        raise Unreadable(f"it is no object of {', '.join(keys)}")
    return value


def _joined(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
