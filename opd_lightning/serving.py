"""Serving: an HTTP server of requests in JSON, of bounded size and number, on this machine or with a token."""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import signal
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .printable import printable


def check_reach(host: str, token: str) -> None:
    """Refuses to let other machines in without a token.

    Args:
        host: where to listen.
        token: name of the environment variable that holds it.

    Raises:
        ValueError: the host is no loopback address, and there is no token.
    """
    address = ipaddress.ip_address(socket.getaddrinfo(host or "0.0.0.0", None)[0][4][0])
    if not address.is_loopback and not os.environ.get(token):
        raise ValueError(
            f"--host={host} lets other machines ask: set the environment variable {token} to a token, here and there, "
            "or listen on 127.0.0.1"
        )


HELD = 64
"""Requests of the largest size whose bodies may be in memory at once, those that wait included."""


class JSONServer(ThreadingHTTPServer):
    """HTTP server; each connection has a thread.

    Args:
        address: host and port; port 0: any that is free.
        handler: of its requests.
        token: name of the environment variable with the token that every request then has to name.
        limit: bytes of the largest request.
        waiting: requests that may wait at once.
    """

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], handler: type[JSONHandler], token: str, limit: int, waiting: int
    ) -> None:
        self.limit, self.token = limit, os.environ.get(token)
        self.room = threading.BoundedSemaphore(waiting)
        self._held, self._lock = 0, threading.Lock()
        super().__init__(address, handler)

    def hold(self, size: int) -> bool:
        """Takes room for a body of so many bytes, or gives it back if negative; False where there is none."""
        with self._lock:
            fits = self._held + size <= HELD * self.limit
            self._held += size if fits else 0
            return fits

    def run(self, what: str) -> None:
        """Answers until the process is told to end; ``what`` is served, for the line that says where."""

        def end(*_: Any) -> None:
            raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, end)
        host, port = self.server_address[:2]
        print(printable(f"serving {what} at http://{host!s}:{port}"), flush=True)
        try:
            self.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            print("no more questions are taken", flush=True)
        finally:
            self.server_close()


class JSONHandler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a client may be silent within a request
    server: JSONServer
    _size = 0

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        finally:
            self.server.hold(-self._size)
            self._size = 0

    def is_let_in(self) -> bool:
        """Compares the token, if there is one."""
        token, given = self.server.token, self.headers.get("Authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            self.close_connection = True  # its body is not read
            self.refuse(401, "this server wants a token")
            return False
        return True

    def body(self) -> dict[str, Any] | None:
        """Reads a JSON object of bounded size; None where it was refused."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > self.server.limit:
            self.close_connection = True
            self.refuse(413 if length else 411, f"a request may have up to {self.server.limit} bytes, and says so")
            return None
        if not self.server.hold(int(length)):
            self.close_connection = True
            self.refuse(503, "too many large requests are here already")
            return None
        self._size = int(length)
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            self.refuse(400, "a request is a JSON object")
            return None
        return body

    def refuse(self, code: int, text: str) -> None:
        """Answers with an error."""
        self.answer(code, {"error": {"message": text, "code": code}})

    def answer(self, code: int, content: dict[str, Any] | bytes) -> None:
        """Answers with JSON, or with bytes as they are."""
        packed = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/octet-stream" if packed is content else "application/json")
        self.send_header("Content-Length", str(len(packed)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(packed)

    def log_message(self, *args: Any) -> None:
        """Says nothing of single requests."""


class Busy(RuntimeError):
    """A request beyond those that may wait."""
