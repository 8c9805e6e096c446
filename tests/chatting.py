"""A chat endpoint in a thread, whose answers a function makes of the request."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.modalities.autoregressive.elsewhere.servers import StandIn


def completion(text: Any, **others: Any) -> dict[str, Any]:
    """What such an endpoint answers: 30 tokens read, 12 written."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 30, "completion_tokens": 12}} | others


class Chatting:
    """Answers `/v1/chat/completions` with a text, or with ``(code, content)``.

    Args:
        answer: to a request's body.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        self.bodies: list[dict[str, Any]] = []

        def handle(path: str, body: Any) -> tuple[int, Any]:
            if path == "/v1/models":
                return 200, {"data": [{"id": "a-model"}]}
            if path != "/v1/chat/completions":
                return 404, {"error": {"message": f"no {path}"}}
            self.bodies.append(body)
            told = answer(body)
            return told if isinstance(told, tuple) else (200, completion(told))

        self.server = StandIn(handle)
        self.url = self.server.url

    @property
    def headers(self) -> list[Any]:
        return self.server.headers


def graded(body: dict[str, Any], grade: Any = 7, feedback: Any = "well") -> str:
    """What `Judge` is answered."""
    return json.dumps({"feedback": feedback, "grade": grade})
