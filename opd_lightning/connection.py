"""Connection: requests to a server over HTTP, with retries and a deadline; one client for all that ask the same one."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from .heart import HEART
from .printable import printable

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 525), 529})
"""Codes of answers that may be another one in a while; from 520 on those of hosts in front of a server."""
LONGEST_PAUSE = 30.0
SHORTEST_SECRET = 8
"""Characters of a token that is hidden where a server repeats it; shorter ones (``EMPTY``) are words, no secrets."""
PIECE = 1 << 16
LARGEST = 1 << 30
"""Bytes of an answer in JSON, above which it is none that was asked for; the memory for it is the run's."""

T = TypeVar("T")


class Refused(ValueError):
    """An answer that no repetition would change; ``code`` is HTTP's."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Connection:
    """A server.

    Attributes:
        url: such as ``http://localhost:8000``.
        token: name of the environment variable that holds its token, which is sent where it is set, and is in no
            message.
        timeout: seconds that one answer may take.
        deadline: seconds after which no answer is waited for any more, repetitions and pauses included.
        closed: set where nobody waits any more.
    """

    url: str
    token: str
    timeout: float
    deadline: float
    closed: threading.Event = field(default_factory=threading.Event, repr=False)

    def ask(self, path: str, body: Any = None, largest: int | None = None, tries: int | None = None) -> bytes:
        """Sends a request (GET without a body) until it is answered.

        What passes (no connection, no answer in time, too many requests, a failure inside) is tried again, with pauses
        that double from half a second to half a minute, or as long as the server says (``Retry-After``).

        Args:
            path: behind the URL.
            body: of the request, as JSON.
            largest: bytes of an answer. Default: no limit.
            tries: most of them. Default: as many as come before the deadline.

        Raises:
            Refused: an answer that would be the same the next time, or a larger one.
            ConnectionError: none until the deadline.
        """
        end, pause, tried = time.monotonic() + self.deadline, 0.5, 0
        while True:
            tried, wished = tried + 1, 0.0
            try:
                return self._once(path, body, max(0.001, min(self.timeout, end - time.monotonic())), largest)
            except urllib.error.HTTPError as error:
                problem = f"{self.url}{path} answered {error.code}: {self.without_token(printable(_text(error)))}"
                if error.code not in PASSING:
                    # not from the error, whose own text is the server's
                    raise Refused(problem + self._advice(error), error.code) from None
                wished = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are such
                reason = printable(getattr(error, "reason", error))
                problem = f"{self.url}{path}: {self.without_token(reason)}"
            # not all at once, where many wait for the same server
            wait = max(wished, pause * random.uniform(0.5, 1.0))
            if tried == tries or end - time.monotonic() <= wait:
                limit = f" within {self.deadline:g} s and {tried} tries, of up to {self.timeout:g} s each"
                raise ConnectionError(
                    f"no answer{limit if tried != tries else ''}: {problem}. Is the server still running? A resumed "
                    "run goes on from its last checkpoint"
                )
            if self.closed.wait(wait):
                raise ConnectionError(f"{self.url} was not asked again, since the run has ended")
            pause = min(2 * pause, LONGEST_PAUSE)

    def ask_json(self, path: str, body: Any = None) -> Any:
        """Sends a request whose answer is JSON.

        Raises:
            ValueError: it is something else.
        """
        answer = self.ask(path, body, LARGEST)
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            text = self.without_token(printable(answer[:200].decode(errors="replace")))
            raise ValueError(f"{self.url}{path} answered something that is no JSON: {text}") from None

    def without_token(self, text: str) -> str:
        """Hides the token in a text of the server, which may repeat what it was sent."""
        secret = os.environ.get(self.token, "").strip()
        return text.replace(secret, "‹token›") if len(secret) >= SHORTEST_SECRET else text

    def _once(self, path: str, body: Any, timeout: float, largest: int | None) -> bytes:
        # 1. the request
        headers = {"Content-Type": "application/json"}
        if secret := os.environ.get(self.token, "").strip():
            if not (secret.isascii() and secret.isprintable()):  # http.client's own error would print it
                raise ValueError(f"the environment variable {self.token} holds characters that no token has")
            headers["Authorization"] = f"Bearer {secret}"
        data = None if body is None else json.dumps(body).encode()
        opener = urllib.request.build_opener(_NowhereElse)
        # 2. the answer, piece by piece: the library's time-out begins anew with each that arrives
        end, pieces, size = time.monotonic() + timeout, list[bytes](), 0
        with opener.open(urllib.request.Request(self.url + path, data, headers), timeout=timeout) as answer:
            while piece := answer.read1(PIECE):
                pieces.append(piece)
                size += len(piece)
                if time.monotonic() > end:
                    raise TimeoutError(f"the answer was not whole after {timeout:g} s")
                if largest is not None and size > largest:
                    raise Refused(f"{self.url}{path} answered more than {largest:,} bytes", answer.status)
            HEART.beat()
            length = answer.headers.get("Content-Length", "")
        if length.isdecimal() and size < int(length):
            raise http.client.IncompleteRead(b"", int(length) - size)
        return b"".join(pieces)

    def _advice(self, error: urllib.error.HTTPError) -> str:
        """Says what helps, where the code tells."""
        if error.code in (401, 403):
            return f"; set the environment variable {self.token}"
        if 300 <= error.code < 400:
            place = self.without_token(printable(error.headers.get("Location", "elsewhere")))
            return f"; it redirects to {place}, which is not followed: if that is right, it is the url"
        return ""


class Client:
    """Requests to one server that are in flight at the same time, of all who ask it.

    Args:
        connection: to the server.
        at_once: most of them.
    """

    def __init__(self, connection: Connection, at_once: int) -> None:
        self.connection, self.at_once = connection, at_once
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def submit(self, call: Callable[..., T], *arguments: Any) -> Future[T]:
        """Has a thread call a function, which asks the server."""
        with self._lock:
            if self._threads is None:
                self.connection.closed.clear()
                self._threads = ThreadPoolExecutor(self.at_once, thread_name_prefix="client")
            return self._threads.submit(call, *arguments)

    def close(self) -> None:
        """Drops what waits. Whoever asks again opens it anew."""
        with self._lock:
            if self._threads is not None:
                self.connection.closed.set()
                self._threads.shutdown(wait=False, cancel_futures=True)
                self._threads = None


_CLIENTS: WeakValueDictionary[tuple[Any, ...], Client] = WeakValueDictionary()
_MAKING = threading.Lock()


def client_of(url: str, token: str, timeout: float, deadline: float, at_once: int) -> Client:
    """Returns the client of a server, the same one for all who ask it with the same limits in this process."""
    key = (os.getpid(), url, token, timeout, deadline, at_once)
    with _MAKING:
        client = _CLIENTS.get(key)
        if client is None:
            client = _CLIENTS[key] = Client(Connection(url, token, timeout, deadline), at_once)
        return client


class _NowhereElse(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the token is for this server alone, and a question would arrive without its body."""

    def redirect_request(self, *args: Any, **keywords: Any) -> None:
        return None


def _text(error: urllib.error.HTTPError) -> str:
    """Reads what an error says, as far as it arrives."""
    try:
        return error.read().decode(errors="replace")[:2000]
    except (OSError, http.client.HTTPException):
        return ""


def _seconds(header: str | None) -> float:
    """Reads ``Retry-After``; 0 where it is a date, or none."""
    return float(header) if header is not None and header.strip().isdecimal() else 0.0
