"""One of the vLLM servers that write a student's rollouts: what it is asked, and which weights it was given."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

from ....connection import Connection, Refused
from ....printable import quoted

TOKEN = "VLLM_API_KEY"
ANSWERS_WITHIN = 5.0
"""Seconds for what a server only has to nod to: that it is there, that it forgets an adapter."""
TRIES = 3  # of a completion, within the limit of one
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0
"""Seconds until a server is asked again that fails in batch after batch; the pauses double."""

STARTED_WITH = {
    "/v1/load_lora_adapter": "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora",
    "/collective_rpc": "VLLM_SERVER_DEV_MODE=1, without which it takes no weights",
    "/reset_prefix_cache": "VLLM_SERVER_DEV_MODE=1, without which it takes no weights",
}


class Unfit(RuntimeError):
    """An answer that is of no use: malformed, or not what the student would say."""


class Refusal(ConnectionError):
    """An answer that would be the same the next time; ``code`` is HTTP's."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class Completed(NamedTuple):
    """Ids of a prompt and of what the server wrote behind it, with the log-prob of each of these."""

    prompt: list[int]
    tokens: list[int]
    log_probs: list[float]


class Replica:
    """A server.

    Args:
        url: such as ``http://localhost:8000``. Its token, if it wants one, is in the environment variable `TOKEN`.
        timeout: seconds for one request.

    Attributes:
        given: folder of the weights that it has; None: not the student's.
        adapters: names under which it may have loaded some.
        read: the longest prompt that it read for the batch before, or nothing.
        unproven: it was given weights, and its prefix cache was not asked since.
        left_out: it did not answer, or not as the student would; it is asked again for a later batch.
        failures: how often it was left out since it last wrote as the student.
        again_at: until when it is not asked, in seconds of `time.monotonic`.

    Raises:
        ValueError: a URL of another form.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"VllmServer: url={url!r} must be such as http://localhost:8000")
        self.given: Path | None = None
        self.adapters: list[str] = []
        self.read: list[int] = []
        self.unproven, self.left_out = False, False
        self.failures, self.again_at = 0, 0.0
        self._base: str | None = None

    @property
    def base(self) -> str:
        """Name of the model that it was started with.

        Raises:
            Unfit: it tells none.
        """
        if self._base is None:
            answer = self.ask("/v1/models")
            try:
                names = [str(model["id"]) for model in json.loads(answer)["data"] if not model.get("parent")]
                self._base = names[0]
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                raise Unfit(f"{self.url}/v1/models names no model: {self._quoted(answer)}") from None
        return self._base

    def fail(self) -> None:
        """Leaves it out: until the next batch, or longer where it failed before."""
        self.left_out, self.failures = True, self.failures + 1
        doubled = FIRST_PAUSE * 2.0 ** min(self.failures - 2, 10)
        self.again_at = time.monotonic() + (min(LONGEST_PAUSE, doubled) if self.failures > 1 else 0.0)

    def answers(self) -> bool:
        """Tells whether it is there again; it may have been started anew, with other weights."""
        since = time.monotonic()
        try:
            self.ask("/v1/models", timeout=ANSWERS_WITHIN)
        except ConnectionError:
            if time.monotonic() - since > 1.0:  # a connection that is refused costs nothing
                self.fail()
            return False
        self.given, self._base, self.left_out = None, None, False
        return True

    def complete(self, request: dict[str, Any]) -> Completed:
        """Asks for a completion.

        Raises:
            ConnectionError: no answer.
            Unfit: one without ids or log-probs, or that ends otherwise than it may.
        """
        answer = self.ask("/v1/completions", request, tries=TRIES)
        # 1. its form
        try:
            (choice,) = json.loads(answer)["choices"]
            tokens, log_probs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            has_form = 0 < len(tokens) == len(log_probs) <= request["max_tokens"]
            has_form = has_form and all(type(token) is int and token >= 0 for token in tokens)
            has_form = has_form and all(type(value) in (int, float) and math.isfinite(value) for value in log_probs)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            has_form = False
        if not has_form:
            wanted = f"up to {request['max_tokens']} token ids with a log-prob each"
            raise Unfit(f"{self.url}: a completion that is not {wanted}: {self._quoted(answer)}")
        # 2. its end
        if tokens[-1] not in request["stop_token_ids"] and len(tokens) < request["max_tokens"]:
            raise Unfit(
                f"{self.url}: a completion ended after {len(tokens)} of {request['max_tokens']} tokens without one of "
                f"the stop tokens {request['stop_token_ids']} (finish_reason {choice.get('finish_reason')!r:.20}); is "
                "--max-model-len too small?"
            )
        return Completed(request["prompt"], tokens, log_probs)

    def ask(self, path: str, body: dict[str, Any] | None = None, timeout: float | None = None, tries: int = 1) -> bytes:
        """Sends a request (GET without a body).

        Raises:
            ConnectionError: no answer in time, or one that is an error.
        """
        seconds = self.timeout if timeout is None else timeout
        try:
            return self._connection(seconds).ask(path, body, tries=tries)
        except Refused as error:
            hint = f"; start it with {STARTED_WITH[path]}" if error.code == 404 and path in STARTED_WITH else ""
            raise Refusal(f"{error}{hint}", error.code) from error

    def _connection(self, seconds: float) -> Connection:
        return Connection(self.url, TOKEN, seconds, seconds)

    def _quoted(self, answer: bytes) -> str:
        text = self._connection(1.0).without_token(answer[:10_000].decode(errors="replace"))
        return quoted(text, 200)
