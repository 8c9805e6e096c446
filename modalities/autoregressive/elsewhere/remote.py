"""Remote: a teacher that a server answers for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ....connection import client_of
from ....distribution import Distribution, Head
from ....heart import HEART
from ....likeness import UNKNOWN
from ....policy import Policy
from ....teacher import Elsewhere, Teacher
from ....trajectory import Example, Trajectories
from .dialect import DIALECTS, Opd
from .handshake import check_known, handshake, same_weights
from .inputs import packed
from .question import Answer, Question, check_tokens, questions, scored, stated
from .store import read_head, write_whole

TOKEN = "OPD_TEACHER_TOKEN"


class Remote(Elsewhere):
    """A teacher behind a URL: it is sent token ids, and answers with their log-probs.

    Rows are rendered here, with the student's tokenizer and template and the teacher's view. Before the first step the
    server is compared with the student's tokenizer, and with itself (docs/elsewhere.md). Whatever is missing in an
    answer is an error.

    Args:
        url: such as ``http://localhost:8000``.
        top_k: how many of the likeliest ids to ask for, besides the action. Servers cap them (vLLM at 20 by default).
        dialect: ``vllm`` (default; also other servers with its ``prompt_logprobs``), ``sglang``, or ``opd`` for
            `opd serve-teacher`.
        hidden: ask for hidden states, of which the exact loss over the vocabulary is computed; for ``opd`` alone.
        model: its name on the server. Default: the first that the server lists.
        at_once: requests in flight, of all teachers that ask this server. Default 32.
        timeout: seconds that one answer may take. Default 120.
        deadline: seconds after which a run ends that gets no answer. Default 600.
        tolerance: nats that the same text may be apart when it is scored again. Default 0.05, ours.
        keep: a folder for answers, which are then asked for once, also by runs that are resumed. Default: none.
        token: name of the environment variable with the server's token. Default: ``OPD_TEACHER_TOKEN``.

    Raises:
        ValueError: a number out of range; when models are loaded: the server reads other ids, tells fewer than
            ``top_k``, or contradicts itself; later: an answer lacks something, or comes from other weights.
        ConnectionError: no answer until the deadline.
    """

    def __init__(
        self,
        url: str,
        top_k: int = 0,
        dialect: Literal["vllm", "sglang", "opd"] = "vllm",
        hidden: bool = False,
        model: str | None = None,
        at_once: int = 32,
        timeout: float = 120.0,
        deadline: float = 600.0,
        tolerance: float = 0.05,
        keep: str | None = None,
        token: str = TOKEN,
    ) -> None:
        if top_k < 0 or at_once < 1 or min(timeout, deadline, tolerance) <= 0:
            raise ValueError(
                f"Remote: top_k={top_k} must be >= 0, at_once={at_once} >= 1, timeout={timeout}, deadline={deadline} "
                f"and tolerance={tolerance} > 0"
            )
        if dialect not in DIALECTS:
            raise ValueError(f"Remote.dialect is one of {', '.join(DIALECTS)}, not {dialect!r}")
        self.url, self.asks, self.tolerance = url.rstrip("/"), top_k, tolerance
        self.top_k = None if hidden else top_k
        self.keep = None if keep is None else Path(keep)
        self.client = client_of(self.url, token, timeout, deadline, at_once)
        self._dialect = DIALECTS[dialect](self.client.connection, model, hidden)
        self._flying: dict[Question, Future[Answer]] = {}
        self._new: list[tuple[Path, Path] | None] = []  # of each unproven answer where it is, and where it will be kept
        self.head: Head | None = None

    def connect(self, teacher: Teacher, setting: Any) -> dict[str, str]:
        where = f"model.teachers.{teacher.name}"
        check_tokens(setting, teacher)
        if teacher.own_template:
            raise ValueError(f"{where}.own_template: rows for a server are written with the student's template")
        return self.greet(where, setting, setting.policies["student"], setting.vocabulary)

    def greet(self, where: str, setting: Any, reader: Policy, vocabulary: int) -> dict[str, str]:
        """Compares the server with the tokenizer whose ids it will be asked about.

        Args:
            where: it stands in the configuration, for messages.
            setting: of the run.
            reader: has the tokenizer.
            vocabulary: ids below it can be actions.

        Raises:
            ValueError: as in `handshake`.
        """
        self._check_shared(where, setting)
        self._dialect.vocabulary = vocabulary
        try:
            about = self._dialect.about()
            facts, self._known, self._said = handshake(
                self._dialect, setting, reader, vocabulary, self.asks, self.tolerance
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if isinstance(self._dialect, Opd) and self._dialect.hidden:
            self.head = read_head(self._dialect.connection.ask("/head"), vocabulary, about["hidden"])
        self._weights, self.context = about["weights"], about.get("context")
        if self.keep is not None:
            self._check_kept(self.keep)
        tells = "hidden states" if self.head else f"log-probs of the actions and {self.asks} likeliest ids"
        return {"server": self.url, "tells": tells, "weights": self._mark(), **facts}

    def _mark(self) -> str:
        """Returns the fingerprint; of weights that a server does not tell apart, what they make of a known text."""
        if not self._is_unknown:
            return self._weights
        log_probs = ",".join(f"{log_prob:.4f}" for log_prob in self._said.tolist())
        return self._weights.replace(UNKNOWN, f"{UNKNOWN}:{log_probs}", 1)

    def same(self, now: str, before: str) -> bool:
        return same_weights(now, before, self.tolerance)

    def ahead(self, teacher: Teacher, setting: Any, batch: Trajectories, views: list[Example | None]) -> None:
        self.send(questions(setting, batch, views, self._dialect.shows))

    def send(self, asked: Sequence[Question | None]) -> None:
        """Sends the questions of a generation batch, once the server is known to have the weights that it had."""
        self._check_weights()
        for left in self._flying.values():  # of a generation batch before, that nobody asked for after all
            left.cancel()
        self._flying.clear()
        for question in asked:
            if question is not None:
                self._submit(question)

    def say(self, teacher: Teacher, setting: Any, batch: Trajectories, views: list[Example | None]) -> Distribution:
        try:
            told = self.answered(questions(setting, batch, views, self._dialect.shows))
            if self.head is None:
                return scored(told, batch, setting.vocabulary, self.asks, self.url)
            return stated(told, batch, self.head)
        except ValueError as error:
            raise ValueError(f"model.teachers.{teacher.name}: {error}") from error

    def answered(self, asked: Sequence[Question | None]) -> list[Answer | None]:
        """Waits for the answers to questions, and sends those that are not on their way."""
        futures = [None if question is None else self._submit(question) for question in asked]
        with HEART.waiting_for("server"):
            told = [None if future is None else future.result() for future in futures]
        for question in asked:
            if question is not None:
                self._flying.pop(question, None)
        self._prove()
        return told

    def _prove(self) -> None:
        """Compares the weights behind new answers, which a server that does not name them could have changed.

        Raises:
            ValueError: they are others.
        """
        new, self._new = self._new, []
        if new:
            self._check_weights()
        for kept in new:
            if kept is not None:
                os.replace(*kept)

    @property
    def _is_unknown(self) -> bool:
        """Whether the server does not tell what it serves."""
        return self._weights.startswith(UNKNOWN)

    def _check_weights(self) -> None:
        check_known(self._dialect.ask(self._known, self.asks).log_probs, self._said, self.tolerance, self.url)

    def _submit(self, question: Question) -> Future[Answer]:
        """Sends a question, unless it is on its way."""
        self._dialect.check(question)
        if question not in self._flying:
            self._flying[question] = self.client.submit(self._answer, question)
        return self._flying[question]

    def _answer(self, question: Question) -> Answer:
        """Finds a question's answer among those that were kept, or asks."""
        if self.keep is None:
            answer, kept = self._dialect.ask(question, self.asks), None
        else:
            content = repr((self._weights, self.asks, self._dialect.hidden, self._dialect.vocabulary, question))
            inputs = packed(question.inputs) if question.inputs else ""
            path = self.keep / f"{hashlib.sha256((content + inputs).encode()).hexdigest()[:40]}.safetensors"
            if path.exists():
                with suppress(SafetensorError, TypeError):  # broken on the disk: it is asked for again
                    return Answer(**load_file(path))
            answer = self._dialect.ask(question, self.asks)
            self.keep.mkdir(parents=True, exist_ok=True)
            kept = path.with_suffix(f".{os.getpid()}-{id(answer)}"), path
            save_file({name: t.contiguous() for name, t in vars(answer).items() if t is not None}, kept[0])
        if self._is_unknown:
            self._new.append(kept)
        elif kept is not None:
            os.replace(*kept)
        return answer

    def _check_shared(self, where: str, setting: Any) -> None:
        """Refuses another client for a server that a teacher asks already: each would send its ``at_once``."""
        for name, other in setting.teachers.items():
            origin = getattr(other.weights, "server", other.weights)
            if isinstance(origin, Remote) and origin.url == self.url and origin.client is not self.client:
                raise ValueError(
                    f"{where} and model.teachers.{name} ask {self.url}, with one connection for both: at_once, "
                    "timeout, deadline and token have to be the same in both"
                )

    def _check_kept(self, folder: Path) -> None:
        """Compares what was kept with who answers now, by a known text: some servers don't say what they serve."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "known.json"
        if path.exists():
            before = torch.tensor(json.loads(path.read_text(encoding="utf-8")))
            check_known(before, self._said, self.tolerance, f"{folder} was filled by other weights: {self.url}")
        else:
            write_whole(path, json.dumps(self._said.tolist()))

    def close(self) -> None:
        self.client.close()
        self._flying = {}
