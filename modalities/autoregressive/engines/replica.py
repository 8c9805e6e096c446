"""One of the vLLM servers that write a student's rollouts: what it is asked, and which weights it was given."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ....connection import Connection, Refused
from ....printable import quoted

TOKEN = "VLLM_API_KEY"
ANSWERS_WITHIN = 5.0  # seconds for a server that was left out to say that it is there again

STARTED_WITH = {
    "/v1/load_lora_adapter": "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora",
    "/collective_rpc": "VLLM_SERVER_DEV_MODE=1, without which it takes no weights",
    "/reset_prefix_cache": "VLLM_SERVER_DEV_MODE=1, without which it takes no weights",
}


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
        fresh: it was given them for this generation batch.
        read: the longest prompt that it read for the batch before, or nothing.
        left_out: it did not answer, or not as the student would; it may be asked again for the next batch.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/"), timeout
        self.given: Path | None = None
        self.fresh, self.left_out = False, False
        self.read: list[int] = []

    @cached_property
    def base(self) -> str:
        """Name of the model that it was started with."""
        models = json.loads(self.ask("/v1/models"))["data"]
        return next(str(model["id"]) for model in models if not model.get("parent"))

    def answers(self) -> bool:
        """Tells whether it is there."""
        try:
            self.ask("/v1/models", timeout=ANSWERS_WITHIN)
        except ConnectionError:
            return False
        return True

    def complete(self, request: dict[str, Any]) -> Completed:
        """Asks for a completion.

        Raises:
            ConnectionError: no answer.
            RuntimeError: one without ids or log-probs, or that ends otherwise than it may.
        """
        (choice,) = json.loads(self.ask("/v1/completions", request))["choices"]
        tokens, log_probs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not tokens or log_probs is None or len(tokens) != len(log_probs):
            raise RuntimeError(
                f"{self.url}: a completion without token ids and as many log-probs: {quoted(choice, 200)}"
            )
        stopped = tokens[-1] in request["stop_token_ids"]
        if not stopped and len(tokens) < request["max_tokens"]:
            raise RuntimeError(
                f"{self.url}: a completion ended after {len(tokens)} of {request['max_tokens']} tokens without one of "
                f"the stop tokens {request['stop_token_ids']} (finish_reason {choice.get('finish_reason')!r}); is "
                "--max-model-len too small?"
            )
        return Completed(request["prompt"], tokens, log_probs)

    def ask(self, path: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> bytes:
        """Sends a request once (GET without a body).

        Raises:
            ConnectionError: no answer in time, or one that is an error.
        """
        seconds = self.timeout if timeout is None else timeout
        try:
            return Connection(self.url, TOKEN, seconds, seconds).ask(path, body, tries=1)
        except Refused as error:
            hint = f"; start it with {STARTED_WITH[path]}" if error.code == 404 and path in STARTED_WITH else ""
            raise ConnectionError(f"{error}{hint}") from error
