"""`opd serve-teacher`: a teacher of a configuration, for runs elsewhere, over HTTP."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ....cli import OPDCLI
from ....likeness import fingerprint
from ....model_card import known_as
from ....pretrained import Pretrained
from ....printable import printable, quoted
from ....serving import Busy, JSONHandler, JSONServer, check_reach
from ....teacher import Frozen, Initial, Same
from ..engines.trial import check_causal, check_head
from .inputs import unpacked
from .other_tokenizer import OtherTokenizer
from .question import Question
from .remote import TOKEN
from .scorer import Scorer, Wish

HELP = """usage: opd serve-teacher [--teacher NAME] [--host HOST] [--port PORT] [--top_k K] -c FILE [--key=value …]

Answer for a teacher of a configuration: how likely it finds given token ids, with weights.dialect: opd of Remote.

Files and keys are those of `opd fit`; nothing is trained, and the student is not loaded.

  --teacher NAME        the entry of model.teachers, one that stands still (default: teacher)
  --host, --port        where to listen (default: 127.0.0.1, 8200). Other machines are let in where the environment
                        variable OPD_TEACHER_TOKEN holds a token, which every request then has to name
  --top_k K             the most ids that are told of a step (default: 100)
  --batch_tokens N      tokens of a batch, padding included (default: 8192)
  --max_request_mib N   the largest request (default: 16)
  --max_waiting N       questions that may wait at once; others are told to come again (default: 4096)
"""


class ServeCLI(OPDCLI):
    """The configuration of a run, of which one teacher is served.

    Args:
        options: of the command line.
        arguments: those of `opd fit`.
    """

    def __init__(self, options: Any, arguments: Sequence[str]) -> None:
        self._options = options
        super().__init__(["fit", *arguments])

    def _run_subcommand(self, subcommand: str) -> None:
        options = self._options
        scorer, about = loaded(self.model, options.teacher, self.trainer.strategy.root_device, options)
        limits = options.max_request_mib * 2**20, options.max_waiting
        try:
            TeacherServer((options.host, options.port), scorer, about, *limits).run(about["weights"])
        finally:
            scorer.close()


def serve_teacher(arguments: Sequence[str]) -> None:
    """Answers for a teacher of a configuration over HTTP."""
    if not arguments or {"-h", "--help"} & {*arguments}:
        print(HELP, end="")
        return
    parser = argparse.ArgumentParser(prog="opd serve-teacher", allow_abbrev=False)
    parser.add_argument("--teacher", type=str, default="teacher")
    parser.add_argument("--host", type=str, default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8200)
    parser.add_argument("--top_k", type=int, default=100)
    parser.add_argument("--batch_tokens", type=int, default=8192)
    parser.add_argument("--max_request_mib", type=int, default=16)
    parser.add_argument("--max_waiting", type=int, default=4096)
    options, rest = parser.parse_known_args(list(arguments))
    for name in ("top_k", "batch_tokens", "max_request_mib", "max_waiting"):
        if getattr(options, name) < (0 if name == "top_k" else 1):
            raise ValueError(f"--{name}={getattr(options, name)} must be at least {0 if name == 'top_k' else 1}")
    check_reach(options.host, TOKEN)
    ServeCLI(options, rest)


def loaded(module: Any, name: str, device: Any, options: Any) -> tuple[Scorer, dict[str, Any]]:
    """Loads a teacher in the student's place, who is not needed; returns what answers, and what it says of itself.

    Raises:
        ValueError: there is no such teacher, it is none that stands still and is another model, or its log-probs would
            not be those of its own forward pass.
    """
    spec, kind = pretrained_of(module, name)
    policy = module.streams.load_frozen(spec)
    policy.model.to(device)
    module.policies["student"], module.student_view = policy, None
    module.teachers.clear()
    # as the audit of a run does, which nobody makes here
    check_head(name, policy, module.head(policy))
    check_causal(policy, module.vocabulary)
    scorer = Scorer(module, policy, options.top_k, options.batch_tokens)
    about = {
        "weights": f"{fingerprint(policy.model)} ({kind}, {known_as(policy.path)})",
        "context": scorer.context,
        "vocabulary": scorer.head.vocabulary,
        "top_k": options.top_k,
        "hidden": scorer.head_settings,
        "inputs": scorer.inputs,
    }
    return scorer, about


def pretrained_of(module: Any, name: str) -> tuple[Pretrained, str]:
    """Finds the model of a teacher that stands still, and the name of its kind.

    Raises:
        ValueError: there is no such teacher, it moves with the student, or is elsewhere itself.
    """
    teacher = module.teachers.get(name)
    weights = None if teacher is None else teacher.weights
    if isinstance(weights, Same):
        return pretrained_of(module, weights.teacher)
    if isinstance(weights, Initial):
        # adapters that training begins with change nothing yet
        lora = module._student_spec.lora
        kept = lora if lora is not None and lora.adapter is not None else None
        plain = {"freeze": None, "dropout": False, "gradient_checkpointing": False}
        return replace(module._student_spec, lora=kept, **plain), "Initial"
    if isinstance(weights, Frozen | OtherTokenizer):
        return weights.pretrained, type(weights).__name__
    kind = f"not there, but {', '.join(module.teachers)}" if weights is None else type(weights).__name__
    raise ValueError(
        f"--teacher={name}: model.teachers.{name} is {kind}; what is served is a model that stands still: Frozen, "
        "Initial, OtherTokenizer, or Same as one of them"
    )


class TeacherServer(JSONServer):
    """HTTP server of one scorer; each request waits for its batch.

    Args:
        address: host and port; port 0: any that is free.
        scorer: answers.
        about: what it says of itself.
        limit: bytes of the largest request.
        waiting: questions that may wait at once.
    """

    def __init__(
        self, address: tuple[str, int], scorer: Scorer, about: dict[str, Any], limit: int, waiting: int
    ) -> None:
        self.scorer, self.about = scorer, about | {"largest": limit}
        super().__init__(address, Handler, TOKEN, limit, waiting)


class Handler(JSONHandler):
    """One request: ``/about``, ``/head``, ``/tokenize`` or ``/score``."""

    server: TeacherServer

    def do_GET(self) -> None:
        """Answers ``/about`` and ``/head``."""
        if self.is_let_in():
            if self.path == "/about":
                self.answer(200, self.server.about)
            elif self.path == "/head" and self.server.scorer.packed_head:
                self.answer(200, self.server.scorer.packed_head)
            else:
                self.refuse(404, f"there is no {quoted(self.path)} here")

    def do_POST(self) -> None:
        """Answers ``/score`` and ``/tokenize``."""
        if not self.is_let_in() or (body := self.body()) is None:
            return
        paths: dict[str, Callable[[dict[str, Any]], dict[str, Any] | bytes]] = {
            "/score": self._score,
            "/tokenize": self._tokenize,
        }
        if self.path not in paths:
            self.refuse(404, f"there is no {quoted(self.path)} here")
            return
        try:
            self.answer(200, paths[self.path](body))
        except Busy as error:
            self.refuse(503, str(error))
        except (ValueError, TypeError, KeyError) as error:
            code = 409 if isinstance(error, OtherWeights) else 400
            self.refuse(code, f"it lacks {error}" if isinstance(error, KeyError) else str(error))
        except Exception as error:  # of a model, which may raise anything
            sys.stderr.write(printable(f"{type(error).__name__}: {error}\n"))
            self.refuse(500, f"the teacher ended in {type(error).__name__}")

    def _score(self, body: dict[str, Any]) -> bytes:
        weights = self.server.about["weights"]
        if body["weights"] != weights:
            raise OtherWeights(f"these are other weights than before: {weights}, and not {quoted(body['weights'])}")
        inputs = unpacked(body.get("inputs"))
        question = Question(tuple(body["prompt"]), tuple(body["actions"]), tuple(body["trained"]), inputs=inputs)
        wish = Wish(int(body["vocabulary"]), int(body["top_k"]), bool(body["hidden"]))
        if not self.server.room.acquire(blocking=False):
            raise Busy("too many questions wait here already")
        try:
            return self.server.scorer.ask(question, wish).result()
        finally:
            self.server.room.release()

    def _tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        scorer = self.server.scorer
        tokenizer, text = scorer.module.tokenizer(), body.get("prompt")
        if text is None:
            text = scorer.policy.processor.apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=True
            )
        return {"tokens": list(tokenizer(str(text), add_special_tokens=False)["input_ids"])}


class OtherWeights(ValueError):
    """A question to weights that were served here before."""
