"""Requests and answers as OpenAI's API has them, of `/v1/chat/completions` and `/v1/completions`.

What is not served is refused by its name: a request that asks for it would get something else than it means.
"""

from __future__ import annotations

import base64
import binascii
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...chat import problem_with_form
from ...printable import quoted
from ...rollout_settings import Rollout, derived_seed
from .stream import Completion

MOST_CHOICES = 16
"""Completions of one request."""
SHORT = 16
"""Tokens of a completion without ``max_tokens``, as OpenAI has it; a chat then has the rest of the context."""

READ = {
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
}
READ_OF = {"messages": READ | {"messages", "max_completion_tokens"}, "prompt": READ | {"prompt"}}
"""Fields by the one that is the prompt; ``top_k`` and ``min_p`` are those that vLLM adds."""
NOTED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
"""Fields that change no answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields that are not served, with the values that ask for nothing."""


class BadRequest(ValueError):
    """A request that can't be answered.

    Args:
        text: what is wrong, for people.
        param: the field that it is about.
        code: OpenAI's word for it.
        status: HTTP's.
    """

    def __init__(self, text: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(text)
        self.param, self.code, self.status = param, code, status


def error(text: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Formats an error as OpenAI does."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Request:
    """Request for completions of one or several prompts.

    Attributes:
        is_chat: whether the prompt is a chat.
        prompts: the chat, or texts and lists of token ids.
        rollout: temperature and filters; its horizon is unread.
        max_tokens: of each completion; None: not said.
        seed: of all draws.
        n: completions of each prompt.
        stops: texts that end a completion.
        streams: whether the answer comes in pieces, and whether its last one counts tokens.
    """

    is_chat: bool
    prompts: Sequence[Any]
    rollout: Rollout
    max_tokens: int | None
    seed: int
    n: int
    stops: tuple[str, ...]
    streams: bool
    counts: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def seeds(self, number: int) -> list[int]:
        """Derives the seeds of the completions of one prompt; with ``n=1`` they don't depend on ``n``."""
        return [derived_seed(self.seed % 2**63, number, choice) for choice in range(self.n)]


def read(body: dict[str, Any], prompt: str, served: str, reads_images: bool) -> Request:
    """Reads a request.

    Args:
        body: its JSON.
        prompt: the field that is the prompt: ``messages`` of a chat, or ``prompt``.
        served: name of the model that answers.
        reads_images: whether it reads images.

    Raises:
        BadRequest: something is missing, out of range, or not served.
    """
    # 1. what it is about
    body = {name: value for name, value in body.items() if value is not None}
    _check_fields(body, READ_OF[prompt])
    if body.get("model", served) != served:
        text = f"there is no model {quoted(body['model'])} here; {quoted(served)} is served"
        raise BadRequest(text, "model", "model_not_found", 404)
    if prompt not in body:
        raise BadRequest(f"{prompt} is missing", prompt)
    prompts = [_chat(body[prompt], reads_images)] if prompt == "messages" else _prompts(body[prompt])
    # 2. how it is answered
    limits = [_whole(body, name, None, 1) for name in ("max_completion_tokens", "max_tokens")]
    rollout = Rollout(
        temperature=_number(body, "temperature", 1.0, 0, 2),
        top_p=_number(body, "top_p", 1.0, 1e-6, 1),
        top_k=_whole(body, "top_k", None, 1),
        min_p=_number(body, "min_p", 0.0, 0, 1) or None,
    )
    n, seed = _whole(body, "n", 1, 1), _whole(body, "seed", None)
    if n * len(prompts) > MOST_CHOICES:
        raise BadRequest(f"{n * len(prompts)} completions are asked for; up to {MOST_CHOICES} are served at once", "n")
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or not isinstance(body.get("stream", False), bool):
        raise BadRequest("stream is true or false, and stream_options an object", "stream")
    return Request(
        prompt == "messages",
        prompts,
        rollout,
        next((limit for limit in limits if limit is not None), None),
        secrets.randbits(63) if seed is None else seed,
        n,
        _stops(body.get("stop", [])),
        body.get("stream", False),
        bool(options.get("include_usage")),
    )


def _check_fields(body: dict[str, Any], known: set[str]) -> None:
    for name, value in body.items():
        if name in NEUTRAL and not any(type(value) is type(one) and value == one for one in NEUTRAL[name]):
            if isinstance(value, float) and value in NEUTRAL[name]:
                continue
            raise BadRequest(f"{name} is not served here; leave it out", name, "unsupported_parameter")
        if name not in known | NOTED | NEUTRAL.keys():
            raise BadRequest(f"{quoted(name)} is no field that is known here", name, "unknown_parameter")


def _chat(messages: Any, reads_images: bool) -> list[dict[str, Any]]:
    problem = "messages is empty" if messages == [] else problem_with_form(messages)
    if problem or not isinstance(messages, list):
        raise BadRequest((problem or "messages is no list").replace("prompt", "messages"), "messages")
    return [{**message, "content": _content(message.get("content"), reads_images)} for message in messages]


def _content(content: Any, reads_images: bool) -> Any:
    """Converts the parts of a content: images in ``data:`` URLs become bytes; nothing is fetched."""
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image_url" and reads_images:
            parts.append({"type": "image", "image": _image(part.get("image_url"))})
        else:
            served = "text and image_url" if reads_images else "text alone"
            raise BadRequest(f"a part of a message's content is {quoted(kind)}; this model reads {served}", "messages")
    return parts


def _image(url: Any) -> bytes:
    text = url.get("url") if isinstance(url, dict) else url
    head, _, data = str(text).partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise BadRequest("an image is given as data:image/…;base64,…; nothing is fetched from elsewhere", "messages")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as failure:
        raise BadRequest(f"an image is no base64: {failure}", "messages") from failure


def _prompts(prompt: Any) -> list[Any]:
    """Reads texts and lists of token ids."""
    prompts = prompt if isinstance(prompt, list) and any(isinstance(one, str | list) for one in prompt) else [prompt]
    for one in prompts:
        is_ids = isinstance(one, list) and one and all(type(i) is int for i in one)
        if not (is_ids or (isinstance(one, str) and one)):
            raise BadRequest(f"prompt is text, token ids, or a list of them, not {quoted(one)}", "prompt")
    return prompts


def _number(body: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadRequest(f"{name} is {quoted(value)}; it is a number from {low:g} to {high:g}", name)
    return float(value)


def _whole(body: dict[str, Any], name: str, default: Any, low: int | None = None) -> Any:
    value = body.get(name, default)
    if value is default:
        return value
    if type(value) is not int or (low is not None and value < low):
        least = "" if low is None else f" of {low} or more"
        raise BadRequest(f"{name} is {quoted(value)}; it is a whole number{least}", name)
    return value


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MOST_CHOICES or not all(isinstance(s, str) and s for s in stops):
        raise BadRequest(f"stop is a text, or up to {MOST_CHOICES} of them, none empty", "stop")
    return tuple(stops)


def usage(prompt: int, completions: Sequence[Completion]) -> dict[str, int]:
    """Counts tokens: of the prompts, each once, and of all completions, their ends included."""
    written = sum(len(completion.ids) for completion in completions)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def answer(request: Request, served: str, completions: Sequence[Completion], prompt: int) -> dict[str, Any]:
    """Formats the whole answer; ``prompt``: tokens of the prompts."""
    choices = [_choice(request, index, one.text, one.reason, True) for index, one in enumerate(completions)]
    return _envelope(request, served, choices, "") | {"usage": usage(prompt, completions)}


def piece(request: Request, served: str, index: int, text: str | None, reason: str | None = None) -> dict[str, Any]:
    """Formats a piece of the completion ``index``; ``text`` None: its beginning."""
    return _envelope(request, served, [_choice(request, index, text, reason, False)], ".chunk")


def last_piece(request: Request, served: str, counts: dict[str, int]) -> dict[str, Any]:
    """Formats the piece that counts tokens."""
    return _envelope(request, served, [], ".chunk") | {"usage": counts}


def _choice(request: Request, index: int, text: str | None, reason: str | None, is_whole: bool) -> dict[str, Any]:
    choice = {"index": index, "logprobs": None, "finish_reason": reason}
    if not request.is_chat:
        return choice | {"text": text or ""}
    if is_whole:
        return choice | {"message": {"role": "assistant", "content": text, "refusal": None}}
    opening = {"role": "assistant", "content": ""}
    return choice | {"delta": opening if text is None else {"content": text} if text else {}}


def _envelope(request: Request, served: str, choices: list[dict[str, Any]], suffix: str) -> dict[str, Any]:
    kind = f"chat.completion{suffix}" if request.is_chat else "text_completion"
    prefix = "chatcmpl" if request.is_chat else "cmpl"
    return {
        "id": f"{prefix}-{request.id}",
        "object": kind,
        "created": request.created,
        "model": served,
        "choices": choices,
    }
