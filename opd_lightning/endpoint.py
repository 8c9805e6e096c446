"""Endpoint: a model that others serve, known by its words alone, behind an OpenAI-style chat interface."""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from .asked import Asked, Reply
from .chat import Chat
from .connection import Client, Refused, client_of
from .printable import printable, quoted

KEY = "OPD_CHAT_KEY"
RUBBISH = 3
"""Answers in a row that are no chat completion, after which no more are asked for."""
MOST = 1 << 31
"""Tokens of one answer, above which a server counts something else."""
WARN_AT = 0.9
"""Share of the budget at which a run is told that it nears its end."""


class BudgetSpent(RuntimeError):
    """The end of a budget; no reward abstains for it, and no part goes on without what it asked for."""


@dataclass
class Budget:
    """Most that may be asked for, over all that is kept in one folder.

    Args:
        tokens: of prompts and answers together. Default: no limit.
        money: in the currency of the prices. Default: no limit.
        input: price of a million tokens of prompts.
        output: price of a million tokens of answers.

    Raises:
        ValueError: a limit that is not positive, a negative price, or a limit of money without prices.
    """

    tokens: int | None = None
    money: float | None = None
    input: float = 0.0
    output: float = 0.0

    def __post_init__(self) -> None:
        for name, limit in (("tokens", self.tokens), ("money", self.money)):
            if limit is not None and not 0 < limit < math.inf:
                raise ValueError(f"endpoint.budget.{name} is {limit}; it must be greater than 0, or null for no limit")
        if not (0 <= self.input < math.inf and 0 <= self.output < math.inf):
            raise ValueError(f"endpoint.budget: the prices input={self.input} and output={self.output} must be >= 0")
        if self.money is not None and not self.input + self.output:
            raise ValueError(
                "endpoint.budget.money is a limit without prices: set input and output, of a million tokens each"
            )

    @property
    def is_limited(self) -> bool:
        """Limits of either kind, or none."""
        return self.tokens is not None or self.money is not None

    def price(self, read: int, written: int) -> float:
        """Computes the price of an answer, of its tokens read and written."""
        return (read * self.input + written * self.output) / 1e6

    def share(self, tokens: int, money: float) -> float:
        """Computes the share of the limits that is spent, the larger one of the two."""
        return max(tokens / (self.tokens or math.inf), money / (self.money or math.inf))

    def told(self, tokens: int, money: float) -> str:
        """Says what is spent, and of how much."""
        texts = [f"{tokens:,}" + (f" of {self.tokens:,}" if self.tokens else "") + " tokens"]
        if self.input + self.output:
            texts.append(f"{money:.4g}" + (f" of {self.money:g}" if self.money else "") + " in money")
        return ", ".join(texts)


@dataclass
class Endpoint:
    """A chat model behind a URL.

    Args:
        url: such as ``http://localhost:8000`` or ``https://api.openai.com/v1``; without a path ``/v1`` is meant.
        model: its name there. Default: the first that the server lists.
        key: name of the environment variable with the key, which is sent where it is set and stands in no log,
            checkpoint, answer or message. Default: ``OPD_CHAT_KEY``.
        keep: folder of answers, which are found again by model, messages and settings: nothing is asked for twice,
            by whichever run. Default: ``runs/asked``, below the folder where `opd` is started.
        budget: the most that may be asked for. Default: no limit, and tokens are counted.
        at_once: requests in flight, of all who ask this server with the same limits. Default 8.
        timeout: seconds that one answer may take. Default 120.
        deadline: seconds after which an answer is waited for no more, repetitions included. Default 600.
        extra: further fields of each request, such as ``{top_p: 0.9}``; null leaves one of ours out.

    Raises:
        ValueError: a URL that is none or holds a user, a password or a query; a key in place of its variable's name; a
            number out of range.
    """

    url: str
    model: str | None = None
    key: str = KEY
    keep: str = "runs/asked"
    budget: Budget = field(default_factory=Budget)
    at_once: int = 8
    timeout: float = 120.0
    deadline: float = 600.0
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # 1. what could hold a secret is not repeated
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("endpoint.url is no URL such as http://localhost:8000 or https://api.openai.com/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(f"endpoint.url holds more than a place, such as a password; put a key into {KEY}")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key):
            raise ValueError(f"endpoint.key is no name of an environment variable; put the key into one, such as {KEY}")
        if self.at_once < 1 or not (0 < self.timeout < math.inf and 0 < self.deadline < math.inf):
            raise ValueError(
                f"endpoint: at_once={self.at_once} must be >= 1, timeout={self.timeout}, deadline={self.deadline} > 0"
            )
        # 2. what is not there before it is needed
        place = parts.path.rstrip("/") or "/v1"
        self._base = f"{parts.scheme}://{parts.netloc}{place}"
        self._asked = Asked(Path(self.keep))
        self._lock = threading.Lock()
        self._flying: dict[str, Future[Reply]] = {}
        self._name: str | None = self.model
        self._is_told = self._is_warned = False
        # 3. who sends the requests, shared with others that ask this server
        self.client: Client = client_of(self._base, self.key, self.timeout, self.deadline, self.at_once)

    def spent(self) -> tuple[int, float]:
        """Sums up tokens and money of all answers in the folder, those of other ranks and earlier runs included."""
        return self._asked.spent()

    def ask(self, messages: Chat, draw: int = 0, **settings: Any) -> Future[Reply]:
        """Asks for the assistant's next message, in a thread of the client.

        Args:
            messages: a chat, of texts.
            draw: number among several answers to the same messages.
            settings: fields of the request, such as ``temperature`` and ``max_tokens``.

        Returns:
            The answer, once it is there; or what was raised on the way: BudgetSpent, ConnectionError, Refused (the
            server's own words), ValueError (no chat completion).
        """
        settings = {name: value for name, value in {**settings, **self.extra}.items() if value is not None}
        client = self.client
        with self._lock:
            content = json.dumps([messages, settings, draw], sort_keys=True, ensure_ascii=False)
            if content not in self._flying:
                future = client.submit(self._answer, client, messages, draw, settings)
                self._flying[content] = future
                future.add_done_callback(lambda _: self._flying.pop(content, None))
            else:
                future = self._flying[content]
        return future

    def _answer(self, client: Client, messages: Chat, draw: int, settings: Mapping[str, Any]) -> Reply:
        """Finds an answer among those that are kept, or asks for it."""
        # 1. whether it is there
        model = self._model(client)
        body = {"model": model, "messages": messages, **settings}
        content = json.dumps([body, draw], sort_keys=True, ensure_ascii=False)
        key = hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()
        if (known := self._asked.find(key)) is not None:
            return known
        # 2. what it may cost, and what it did
        self._check_budget(model)
        reply = self._complete(client, body)
        self._asked.keep(key, content, reply, self.budget.price(reply.read, reply.written))
        return reply

    def _model(self, client: Client) -> str:
        """Returns the model's name, or that of the first that the server lists."""
        if self._name is None:
            listed = client.connection.ask_json("/models")
            try:
                self._name = str(listed["data"][0]["id"])
            except (KeyError, TypeError, IndexError):
                raise ValueError(
                    f"{self._base}/models lists no model: {quoted(listed, 200)}; set endpoint.model"
                ) from None
        return self._name

    def _check_budget(self, model: str) -> None:
        """Says what is spent at the start and near the end.

        Raises:
            BudgetSpent: nothing is left.
        """
        if not self.budget.is_limited and self._is_told:
            return
        tokens, money = self.spent()
        share, told = self.budget.share(tokens, money), self.budget.told(tokens, money)
        with self._lock:
            is_first, self._is_told = not self._is_told, True
            is_late, self._is_warned = share >= WARN_AT and not self._is_warned, self._is_warned or share >= WARN_AT
        if share >= 1:
            raise BudgetSpent(
                f"the budget of what is asked of {printable(model)} at {self._base} is spent: {told}, counted in "
                f"{self._asked.path}. Nothing is lost: answers are kept there, and a resumed run asks for none of them "
                "again. Raise endpoint.budget and go on with --ckpt_path=last"
            )
        if is_first:
            rank_zero_info(printable(f"asking {model} at {self._base}: {told} spent so far in {self._asked.path}"))
        if is_late:
            rank_zero_warn(printable(f"the budget of {self._base} nears its end: {told} spent"))

    def _complete(self, client: Client, body: Mapping[str, Any]) -> Reply:
        """Asks until there is a chat completion.

        Raises:
            ValueError: what comes is none, again and again; or it does not say its tokens, which a budget needs.
        """
        hidden, path = client.connection.without_token, "/chat/completions"
        for left in reversed(range(RUBBISH)):
            try:
                reply = read_completion(client.connection.ask_json(path, body))
                break
            except Refused as error:
                advice = "; leave fields out with null in endpoint.extra" if error.code in (400, 422) else ""
                raise Refused(f"{error}{advice}", error.code) from None
            except ValueError as error:
                if not left:
                    raise ValueError(
                        f"{self._base}{path} answered {RUBBISH} times with something that is no chat completion: "
                        f"{hidden(printable(error))}"
                    ) from None
        if self.budget.is_limited and not reply.counted:
            raise ValueError(f"{self._base} does not say how many tokens an answer has, and endpoint.budget is set")
        return Reply(hidden(reply.text), reply.cut, reply.read, reply.written, reply.counted)

    def close(self) -> None:
        """Drops what nobody waits for any more."""
        self.client.close()


def read_completion(answer: Any) -> Reply:
    """Reads a chat completion: the text of its first choice, and its tokens.

    Raises:
        ValueError: it is none.
    """
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"it has no choices with a message: {quoted(answer, 200)}") from None
    if not isinstance(text, str | None):
        raise ValueError(f"its message is no text: {quoted(text, 200)}")
    text = (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a character can't be kept
    usage = answer.get("usage")
    read, written = (usage.get(f"{of}_tokens") if isinstance(usage, dict) else None for of in ("prompt", "completion"))
    is_cut = choice.get("finish_reason") == "length"
    if type(read) is int and type(written) is int and 0 <= min(read, written) <= max(read, written) < MOST:
        return Reply(text, is_cut, read, written)
    return Reply(text, is_cut, counted=False)
