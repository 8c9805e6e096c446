"""A server that says what it is told to, byte by byte."""

from __future__ import annotations

import socket
import threading


def raw_server(*answers: bytes) -> str:
    """A server that sends some bytes to each connection in turn, and closes it."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with listening:
            for content in answers:
                with listening.accept()[0] as connection:
                    connection.recv(65536)
                    connection.sendall(content)

    threading.Thread(target=answer, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"
