"""Servers of teachers: `opd serve-teacher` in a process of its own, and stand-ins that answer as others do."""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from safetensors.torch import load

from opd_lightning.modalities.autoregressive.elsewhere.question import Question
from opd_lightning.modalities.autoregressive.elsewhere.scorer import Scorer, Wish
from opd_lightning.modalities.autoregressive.elsewhere.serve import TeacherServer, loaded
from tests.processes import FORKS
from tests.tiny import make_module


def _serve(arguments: list[str], log: str) -> None:
    """What `opd serve-teacher` does, in the forked process."""
    from opd_lightning.modalities.autoregressive.elsewhere.serve import serve_teacher

    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    serve_teacher(arguments)


class Served:
    """`opd serve-teacher` in a process of its own."""

    def __init__(self, config: Any, *extra: str, port: int = 0) -> None:
        self.log = tempfile.NamedTemporaryFile("r", encoding="utf-8", suffix=".log")  # noqa: SIM115
        arguments = [f"--port={port}", "-c", str(config), *extra]
        self.process = FORKS.Process(target=_serve, args=(arguments, self.log.name), daemon=True)
        self.process.start()
        while not (found := re.search(r"at (http://[\d.:]+)", self.output)):
            assert self.process.is_alive(), self.output
            time.sleep(0.1)
        self.url = found[1]

    @property
    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class StandIn:
    """A server in a thread, whose answers a function makes: ``(path, body)`` to a code and what is written."""

    def __init__(self, answer: Callable[[str, Any], tuple[int, Any]]) -> None:
        stand_in = self
        self.asked: list[str] = []
        self.headers: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                stand_in.asked.append(self.path)
                stand_in.headers.append(self.headers)
                code, content = answer(self.path, body)
                packed = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(packed)))
                self.end_headers()
                self.wfile.write(packed)

            do_GET = do_POST

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Imitation:
    """Answers as vLLM and SGLang document, for a model; ``cap`` is the most ids that they tell."""

    def __init__(self, path: Any, cap: int = 20, batch_tokens: int = 512) -> None:
        self.module = make_module(path, path)
        self.cap = cap
        self.scorer = Scorer(self.module, self.module.policies["student"], 1000, batch_tokens)

    def _told(self, tokens: list[int], top_k: int) -> tuple[list[float], list[dict[int, float]]]:
        """Log-probs of all tokens but the first, and the likeliest ones."""
        question = Question(tuple(tokens[:1]), tuple(tokens[1:]), tuple(range(len(tokens) - 1)))
        wish = Wish(self.scorer.head.vocabulary, top_k, False)
        told = load(self.scorer.ask(question, wish).result())
        rows: list[dict[int, float]] = [{} for _ in question.actions]
        if top_k:
            rows = [
                dict(zip(i, v, strict=True)) for i, v in zip(told["ids"].tolist(), told["top"].tolist(), strict=True)
            ]
        return told["log_probs"].tolist(), rows

    def __call__(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny", "max_model_len": 256}]}
        if path == "/tokenize":
            if "messages" in body:
                return 400, {"error": {"message": "no chat template"}}
            return 200, {"tokens": self.module.tokenizer()(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/v1/completions":
            return self.completions(body["prompt"], body["prompt_logprobs"])
        if path == "/get_model_info":
            return 200, {"model_path": "tiny"}
        if path == "/generate":
            return self.generate(body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"])
        return 404, {"error": {"message": "Not Found"}}

    def completions(self, tokens: list[int], top_k: int) -> tuple[int, Any]:
        if top_k > self.cap:
            text = f"Requested prompt logprobs of {top_k}, which is greater than max allowed: {self.cap}"
            return 400, {"error": {"message": text}}
        own, rows = self._told(tokens, top_k)
        entries: list[Any] = [None]
        for token, value, row in zip(tokens[1:], own, rows, strict=True):
            entries.append(
                {str(i): {"logprob": v, "rank": 1, "decoded_token": "?"} for i, v in {**row, token: value}.items()}
            )
        return 200, {"choices": [{"text": "?", "prompt_logprobs": entries}]}

    def generate(self, tokens: list[int], start: int, top_k: int) -> tuple[int, Any]:
        own, rows = self._told(tokens, top_k)
        entries = [[value, token, None] for value, token in zip([None, *own], tokens, strict=True)][start:]
        entries[0][0] = None  # of a span's first token nothing is told
        top = [None, *([[v, i, None] for i, v in row.items()] for row in rows)][start:]
        told = {"input_token_logprobs": entries, "input_top_logprobs": top if top_k else None}
        return 200, {"text": "", "meta_info": told}


@contextmanager
def answering(
    module: Any, limit: int = 2**24, waiting: int = 64, name: str = "teacher", **options: int
) -> Iterator[TeacherServer]:
    """`opd serve-teacher` of a module's teacher, in a thread of this process; it answers at its ``url``."""
    settings = argparse.Namespace(**{"top_k": 20, "batch_tokens": 2048} | options)
    scorer, about = loaded(module, name, "cpu", settings)
    server = TeacherServer(("127.0.0.1", 0), scorer, about, limit, waiting)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        scorer.close()


def post(url: str, path: str, body: Any, **headers: str) -> tuple[int, bytes]:
    """Sends JSON (bytes as they are); returns the code and the content of the answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
