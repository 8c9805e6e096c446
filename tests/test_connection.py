"""Requests to servers that are busy, slow, broken or hostile, and who shares them."""

from __future__ import annotations

import gc
import socket
import threading
import time
import traceback

import pytest

from opd_lightning.connection import Connection, Refused, client_of
from tests.raw import raw_server

SECRET = "sk-very-secret-0123"


def http(code, body=b"{}", *headers):
    return b"\r\n".join([f"HTTP/1.1 {code}".encode(), *headers, b"Content-Length: %d" % len(body), b"", body])


def connection(url, timeout=5.0, deadline=5.0):
    return Connection(url, "A_TOKEN", timeout, deadline)


def test_a_busy_server_says_when_to_come_again():
    began = time.monotonic()
    assert connection(raw_server(http("429 Busy", b"{}", b"Retry-After: 1"), http("200 OK"))).ask_json("/") == {}
    assert time.monotonic() - began >= 1


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"rubbish\r\n\r\n",
        b"",
        http("529 Overloaded"),
        http("200 OK", b"{}")[:-1],
        CHUNKED + b"2\r\n{",
        CHUNKED + b"2\r\n{}\r\n",
        CHUNKED + b"many\r\n{}\r\n0\r\n\r\n",
    ],
)
def test_what_passes_is_tried_again(answer):
    assert connection(raw_server(answer, http("200 OK"))).ask_json("/") == {}


def test_a_length_that_is_none_is_not_compared():
    assert connection(raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}")).ask_json("/") == {}


def test_an_answer_without_an_end_fills_no_memory(monkeypatch):
    monkeypatch.setattr("opd_lightning.connection.LARGEST", 99)
    assert connection(raw_server(http("200 OK", b"{}".rjust(99)))).ask_json("/") == {}
    with pytest.raises(Refused, match="answered more than 99 bytes"):
        connection(raw_server(http("200 OK", b"{}".rjust(100)))).ask_json("/")


def test_a_redirect_is_named_and_not_followed():
    with pytest.raises(Refused, match=r"answered 307: .*redirects to http://elsewhere/v1, which is not followed"):
        connection(raw_server(http("307 Temporary", b"", b"Location: http://elsewhere/v1"))).ask("/")


def test_a_body_that_comes_drop_by_drop_ends_with_the_time_limit():
    listening = socket.create_server(("127.0.0.1", 0))

    def drip():
        while True:
            one = listening.accept()[0]
            one.recv(65536)
            one.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            try:
                while True:
                    one.sendall(b"x")
                    time.sleep(0.05)
            except OSError:
                continue

    threading.Thread(target=drip, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"no answer within 0\.5 s"):
        connection(f"http://127.0.0.1:{listening.getsockname()[1]}", 0.3, 0.5).ask("/")
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("code", ["401 bad key " + SECRET, "500 " + SECRET])
def test_a_token_that_is_repeated_is_in_no_message(monkeypatch, code):
    monkeypatch.setenv("A_TOKEN", SECRET + "\n")
    with pytest.raises((Refused, ConnectionError)) as caught:
        connection(raw_server(*[http(code, f"no such key: {SECRET}".encode())] * 5), deadline=0.2).ask("/")
    text = "".join(traceback.format_exception(caught.value))
    assert SECRET not in text
    assert "no such key: ‹token›" in text


def test_a_token_that_is_none_is_not_printed(monkeypatch):
    monkeypatch.setenv("A_TOKEN", f"{SECRET}\r\nX: y")
    with pytest.raises(ValueError, match="A_TOKEN holds characters that no token has") as caught:
        connection("http://127.0.0.1:9").ask("/")
    assert SECRET not in str(caught.value)


def test_one_client_for_all_who_ask_a_server():
    limits = ("http://127.0.0.1:9", "A_TOKEN", 1.0, 1.0)
    one, other = client_of(*limits, 2), client_of(*limits, 2)
    assert one is other
    assert client_of(*limits, 3) is not one
    flying, most, lock = [0], [0], threading.Lock()

    def call():
        with lock:
            flying[0] += 1
            most[0] = max(most[0], flying[0])
        time.sleep(0.02)
        with lock:
            flying[0] -= 1

    for future in [client.submit(call) for client in (one, other) for _ in range(5)]:
        future.result()
    assert most[0] == 2, "together"
    one.close()
    assert other.submit(lambda: 1).result() == 1, "whoever asks again opens it anew"
    other.close()
    del one, other
    gc.collect()
    assert client_of(*limits, 2)._threads is None
