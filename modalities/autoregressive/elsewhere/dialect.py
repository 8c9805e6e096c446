"""Dialects: how servers are asked for log-probs of given token ids.

Shape legend: n trained steps of one trajectory, k ids told of each.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import load

from ....connection import Connection, Refused
from ....distribution import IMPOSSIBLE
from ....distribution.scored import ABOVE
from ....printable import quoted
from .inputs import check_forms, packed
from .question import Answer, Question

NEVER = -9999.0
"""Log-prob of a token without probability, as vLLM writes it in JSON, which knows no infinity."""


class Dialect(ABC):
    """One way to ask.

    Args:
        connection: to the server.
        model: its name there; None: the first that the server lists.
        hidden: ask for hidden states.

    Attributes:
        vocabulary: ids below it can be actions; known once the student is loaded.
        shows: whether a question brings the prompt's images with it.
    """

    vocabulary, shows = 0, False

    def __init__(self, connection: Connection, model: str | None, hidden: bool) -> None:
        self.connection, self.model, self.hidden = connection, model, hidden
        if hidden and not isinstance(self, Opd):
            raise ValueError(f"hidden: {type(self).__name__} servers tell no hidden states; `opd serve-teacher` does")

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Asks who is there: ``weights``, and ``context`` (tokens of a row) where it is said."""

    def check(self, question: Question) -> None:
        """Refuses a question about images that the teacher would not see.

        Raises:
            ValueError: with the reason.
        """
        if question.media:
            raise ValueError(
                f"{self.connection.url} is sent token ids alone, and the prompt shows images, which the teacher would "
                f"never see: {type(self).__name__} servers document no request that shows images beside given token "
                "ids and asks for log-probs of these. `opd serve-teacher` answers such (weights.dialect: opd)"
            )

    @abstractmethod
    def ask(self, question: Question, top_k: int) -> Answer:
        """Asks about one trajectory.

        Raises:
            ValueError: the answer lacks a log-prob, or is about other tokens.
            ConnectionError: as in `Connection.ask`.
        """

    def ids(self, text: str) -> list[int] | None:
        """Asks for the ids of a text, without special tokens; None: this server doesn't say."""
        return self._tokenized({"prompt": text, "add_special_tokens": False})

    def rendered(self, messages: list[dict[str, str]]) -> list[int] | None:
        """Asks for the ids of a chat that is to be answered; None: this server doesn't say."""
        return self._tokenized({"messages": messages, "add_generation_prompt": True})

    def _tokenized(self, body: dict[str, Any]) -> list[int] | None:
        try:
            answer = self.connection.ask_json("/tokenize", {"model": self.model, **body})
        except Refused:  # no such path, or no chat template
            return None
        ids = answer.get("tokens") if isinstance(answer, dict) else None
        # none at all: it was asked in a way that it does not know (llama.cpp)
        return ids if ids and isinstance(ids, list) and all(isinstance(i, int) for i in ids) else None

    def _missing(self, what: str, answer: Any) -> ValueError:
        return ValueError(f"{self.connection.url} answered without {what}: {quoted(answer, 200)}")


class Vllm(Dialect):
    """Asks vLLM: ``/v1/completions`` with ``prompt_logprobs``, which are those of the plain distribution."""

    def about(self) -> dict[str, Any]:
        listed = self.connection.ask_json("/v1/models")
        try:
            models = {entry["id"]: entry for entry in listed["data"]}
            self.model = self.model or next(iter(models))
            own = models[self.model]
        except (KeyError, TypeError, StopIteration) as error:
            raise self._missing(f"a model {self.model or ''} in its list", listed) from error
        longest = own.get("max_model_len")
        return {"weights": f"unknown ({self.model})", "context": longest and longest - 1}  # it writes a token, too

    def ask(self, question: Question, top_k: int) -> Answer:
        # 1. one token is written, which some servers insist on; nothing reads it
        tokens = [*question.prompt, *question.actions]
        body = {"model": self.model, "prompt": tokens, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k}
        answer = self.connection.ask_json("/v1/completions", body)
        try:
            told = answer["choices"][0].get("prompt_logprobs")  # left out by who does not know it, such as llama.cpp
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise self._missing("choices", answer) from error
        if not isinstance(told, list) or len(told) != len(tokens):
            count = len(told) if isinstance(told, list) else "no"
            raise self._missing(f"prompt_logprobs of {len(tokens)} tokens (it has {count})", answer)
        # 2. of each trained step the token's own, and the likeliest ones
        start, rows = len(question.prompt), []
        for step in question.trained:
            entries = told[start + step]
            try:
                values = {int(token): float(entry["logprob"]) for token, entry in entries.items()}
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise self._missing(f"a log-prob of token {start + step}", entries) from error
            rows.append(values)
        return collected(question, rows, top_k, self.connection.url)


class Sglang(Dialect):
    """Asks SGLang: ``/generate`` with ``logprob_start_len``."""

    def about(self) -> dict[str, Any]:
        for path in ("/model_info", "/get_model_info"):  # the latter in earlier versions
            try:
                info = self.connection.ask_json(path)
                return {"weights": f"unknown ({info['model_path']})", "context": info.get("max_context_length")}
            except Refused:
                continue
            except (KeyError, TypeError) as error:
                raise self._missing("model_path", info) from error
        return {"weights": "unknown"}

    def ask(self, question: Question, top_k: int) -> Answer:
        # 1. from the last token of the prompt on; of the first one of a span there is no log-prob
        tokens, start = [*question.prompt, *question.actions], len(question.prompt) - 1
        answer = self.connection.ask_json(
            "/generate",
            {
                "input_ids": tokens,
                "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
                "return_logprob": True,
                "logprob_start_len": start,
                "top_logprobs_num": top_k,
            },
        )
        try:
            own = answer["meta_info"]["input_token_logprobs"]
            top = answer["meta_info"]["input_top_logprobs"] if top_k else [[]] * len(own)
            # from the end, since versions differ in where they begin
            own, top = own[-len(question.actions) :], top[-len(question.actions) :]
            aligned = [entry[1] for entry in own] == list(question.actions) and len(top) == len(own)
            if not aligned:
                raise self._missing("input_token_logprobs of the tokens that it was asked about", own)
            # 2. the likeliest ones, and the token's own
            rows = [
                {int(token): float(value) for value, token, *_ in [*(top[step] or ()), own[step]]}
                for step in question.trained
            ]
        except (KeyError, TypeError, IndexError) as error:
            raise self._missing("log-probs of the tokens that it was asked about", answer) from error
        return collected(question, rows, top_k, self.connection.url)


class Opd(Dialect):
    """Asks `opd serve-teacher`."""

    shows = True

    def about(self) -> dict[str, Any]:
        about = self.connection.ask_json("/about")
        if not isinstance(about, dict) or "weights" not in about:
            raise self._missing("what it serves", about)
        self._weights, self._inputs, self._largest = about["weights"], about.get("inputs", {}), about.get("largest")
        return about

    def check(self, question: Question) -> None:
        if question.media:
            check_forms(question.inputs, self._inputs, f"the teacher at {self.connection.url}")

    def ask(self, question: Question, top_k: int) -> Answer:
        body = {
            "prompt": question.prompt,
            "actions": question.actions,
            "trained": question.trained,
            "top_k": top_k,
            "vocabulary": self.vocabulary,
            "hidden": self.hidden,
            "weights": self._weights,
        }
        if question.inputs:
            body["inputs"] = packed(question.inputs)
            # a server reads no further than its limit, and who still writes then sees a connection that breaks off
            if self._largest is not None and (size := len(json.dumps(body))) > self._largest:
                raise ValueError(
                    f"a question with its images has {size / 2**20:.1f} MiB, and {self.connection.url} takes up to "
                    f"{self._largest / 2**20:.1f}: raise its --max_request_mib, or show smaller images"
                )
        answered = self.connection.ask("/score", body)
        try:
            told = load(answered)
            answer = Answer(told["log_probs"], told.get("ids"), told.get("top"), told.get("hidden"))
        except Exception as error:  # of foreign bytes, which may raise anything
            raise self._missing("log-probs", answered[:200].decode(errors="replace")) from error
        wanted = {"ids": top_k > 0, "top": top_k > 0, "hidden": self.hidden}
        lacking = [name for name, is_wanted in wanted.items() if is_wanted and name not in told]
        if lacking or any(len(tensor) != len(question.trained) for tensor in told.values()):
            what = ", ".join(lacking) or "an entry"
            raise self._missing(f"{what} for each of {len(question.trained)} steps", [*told])
        check_possible(answer.log_probs.tolist(), self.connection.url)
        return answer


DIALECTS: dict[str, Callable[[Connection, str | None, bool], Dialect]] = {"vllm": Vllm, "sglang": Sglang, "opd": Opd}


def collected(question: Question, rows: list[dict[int, float]], top_k: int, who: str) -> Answer:
    """Makes an answer of log-probs by id at each trained step.

    Raises:
        ValueError: the action's is missing or none, or fewer than ``top_k`` are there.
    """
    own, ids, values = [], [], []
    for step, row in zip(question.trained, rows, strict=True):
        action = question.actions[step]
        if action not in row:
            raise ValueError(f"{who} told no log-prob of the token {action} at step {step}, but of {sorted(row)}")
        own.append(row[action])
        best = sorted(row, key=lambda token: row[token], reverse=True)[:top_k]
        if len(best) < top_k:
            raise ValueError(
                f"{who} told {len(best)} ids where top_k={top_k} were asked for: it caps them. Lower weights.top_k, or "
                "raise the server's limit (vLLM: --max-logprobs)"
            )
        ids.append(best)
        values.append([row[token] for token in best])
    check_possible(own, who)
    if not top_k:
        return Answer(torch.tensor(own))
    return Answer(torch.tensor(own), torch.tensor(ids), torch.tensor(values).clamp(min=IMPOSSIBLE))


def check_possible(log_probs: Sequence[float], who: str) -> None:
    """Refuses what can't be the log-prob of a token that was written.

    Raises:
        ValueError: it is no number, above 0, or that of an impossible token.
    """
    if wrong := [value for value in log_probs if not NEVER < value <= ABOVE]:
        raise ValueError(
            f"{who} told {len(wrong)} of {len(log_probs)} log-probs of what the student wrote that can be none, such "
            f"as {wrong[0]:.4g}: they are numbers up to 0, and that of a token which a server masks (-inf, or "
            f"{NEVER:g} of vLLM) would decide the whole update"
        )
