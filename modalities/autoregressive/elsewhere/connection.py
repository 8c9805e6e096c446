"""Connection: requests to a server over HTTP, with retries and a deadline."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from ....printable import printable

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Codes of answers that may be another one in a while."""
LONGEST_PAUSE = 30.0


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
        token: name of the environment variable that holds its token, which is sent where it is set.
        timeout: seconds that one answer may take.
        deadline: seconds after which no answer is waited for any more, repetitions and pauses included.
        closed: set where nobody waits any more.
    """

    url: str
    token: str
    timeout: float
    deadline: float
    closed: threading.Event = field(default_factory=threading.Event, repr=False)

    def ask(self, path: str, body: Any = None) -> bytes:
        """Sends a request (GET without a body) until it is answered.

        What passes (no connection, no answer in time, too many requests, a failure inside) is tried again, with pauses
        that double from half a second to half a minute.

        Raises:
            Refused: an answer that would be the same the next time.
            ConnectionError: none until the deadline.
        """
        end, pause, tries = time.monotonic() + self.deadline, 0.5, 0
        while True:
            tries += 1
            try:
                return self._once(path, body, max(0.001, min(self.timeout, end - time.monotonic())))
            except urllib.error.HTTPError as error:
                text = printable(_text(error))
                problem = f"{self.url}{path} answered {error.code}: {text}"
                if error.code not in PASSING:
                    raise Refused(problem + self._advice(error.code), error.code) from error
            except (OSError, http.client.IncompleteRead) as error:  # URLError and time-outs are such
                problem = f"{self.url}{path}: {printable(getattr(error, 'reason', error))}"
            if (left := end - time.monotonic()) <= 0:
                raise ConnectionError(
                    f"no answer within {self.deadline:g} s and {tries} tries, of up to {self.timeout:g} s each: "
                    f"{problem}. Is the server still running? A resumed run goes on from its last checkpoint"
                )
            # not all at once, where many wait for the same server
            if self.closed.wait(min(pause * random.uniform(0.5, 1.0), left)):
                raise ConnectionError(f"{self.url} was not asked again, since the run has ended")
            pause = min(2 * pause, LONGEST_PAUSE)

    def ask_json(self, path: str, body: Any = None) -> Any:
        """Sends a request whose answer is JSON.

        Raises:
            ValueError: it is something else.
        """
        answer = self.ask(path, body)
        try:
            return json.loads(answer)
        except ValueError as error:
            text = printable(answer[:200].decode(errors="replace"))
            raise ValueError(f"{self.url}{path} answered something that is no JSON: {text}") from error

    def _once(self, path: str, body: Any, timeout: float) -> bytes:
        headers = {"Content-Type": "application/json"}
        if secret := os.environ.get(self.token):
            headers["Authorization"] = f"Bearer {secret}"
        data = None if body is None else json.dumps(body).encode()
        opener = urllib.request.build_opener(_NowhereElse)
        with opener.open(urllib.request.Request(self.url + path, data, headers), timeout=timeout) as answer:
            read: bytes = answer.read()
        return read

    def _advice(self, code: int) -> str:
        return f"; set the environment variable {self.token}" if code in (401, 403) else ""


class _NowhereElse(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the token is for this server alone, and a question would arrive without its body."""

    def redirect_request(self, *args: Any, **keywords: Any) -> None:
        return None


def _text(error: urllib.error.HTTPError) -> str:
    """Reads what an error says, as far as it arrives."""
    try:
        return error.read().decode(errors="replace")[:500]
    except (OSError, http.client.IncompleteRead):
        return ""
