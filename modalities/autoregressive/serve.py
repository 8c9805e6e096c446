"""`opd serve RUN`: the student of a run behind an endpoint that speaks as OpenAI's does, to try it out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from ...cli_errors import Parser
from ...export import load_module, student_alone
from ...printable import printable, quoted
from ...rows import reason_of
from ...serving import Busy, JSONHandler, JSONServer, check_reach
from ...trajectory import Example
from . import protocol
from .models import bare, context_length
from .stream import Acting, Completion, Turns, acting_on, begun, stream

TOKEN = "OPD_SERVE_TOKEN"
SETTINGS = {
    True: "opd_lightning.modalities.vision_language.VisionLanguageDistillation",
    False: "opd_lightning.modalities.text.TextDistillation",
}
"""Settings of exported folders, by whether their model sees."""
ASKED_WITH = ("chat_template_kwargs", "raw_prompts")
"""Arguments of a setting that say how its student is asked."""


def serve(arguments: Sequence[str]) -> None:
    """Answers for the student of a run over HTTP, as OpenAI's API does.

    ``opd serve RUN [--host HOST] [--port PORT] [--name NAME] [--device DEVICE] [--max_request_mib N]``
    """
    parser = Parser(
        prog="opd serve", description="Answer for a student over HTTP, as OpenAI's API does.", allow_abbrev=False
    )
    parser.add_argument(
        "run", type=str, help="a run's folder (its newest checkpoint), a checkpoint, or what opd export wrote"
    )
    parser.add_argument(
        "--host", type=str, default="127.0.0.1", help=f"where to listen; others than this machine need {TOKEN}"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--name", type=str, default=None, help="of the model (default: the folder's)")
    parser.add_argument(
        "--device", type=str, default="auto", help="such as cpu, cuda:0 (default: a GPU where there is one)"
    )
    parser.add_argument("--max_request_mib", type=int, default=4, help="the largest request")
    parser.add_argument("--max_waiting", type=int, default=64, help="requests at once; others are told to come again")
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="run code that comes with the student")
    options = parser.parse_args(list(arguments))
    for name in ("max_request_mib", "max_waiting"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name}={getattr(options, name)} must be at least 1")
    check_reach(options.host, TOKEN)
    module = load(options.run, options.device, options.trust_remote_code)
    name = options.name or name_of(options.run)
    limits = options.max_request_mib * 2**20, options.max_waiting
    StudentServer((options.host, options.port), module, name, *limits).run(f"{name} (OpenAI's API, /v1)")


def load(run: str, device: str = "auto", trust_remote_code: bool = False) -> Any:
    """Loads a student that nobody trains any more, in its setting.

    Args:
        run: folder of a run, whose newest checkpoint is meant, a checkpoint, or a folder that `opd export` wrote.
        device: where it computes; ``auto``: a GPU where there is one.
        trust_remote_code: run code that comes with it.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it writes no tokens, or its folder holds an adapter alone.
    """
    path = Path(run)
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{run} holds an adapter without its base; serve the run, or export it with --merge=true")
    if (path / "config.json").is_file():
        module = student_alone(_exported(run, trust_remote_code), trust_remote_code)
    else:
        module, config, steps = load_module(run, trust_remote_code)
        asked_with = config["model"]["init_args"]
        vars(module).update({name: asked_with[name] for name in ASKED_WITH if asked_with.get(name) is not None})
        print(printable(f"{run}: the student after {steps} optimizer steps"), flush=True)
    if "categorical" not in module.provides:
        raise ValueError(f"{run}: {type(module).__name__} trains no model that writes text")
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    model = module.policies["student"].model.eval().requires_grad_(False)
    model.to(where)
    # what `generate` would read; here every request says how it is answered
    bare(model).generation_config = GenerationConfig()
    return module


def _exported(folder: str, trust_remote_code: bool) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    dtype = str(getattr(config, "dtype", None)).removeprefix("torch.")
    student = {"path": folder, "trust_remote_code": trust_remote_code}
    if dtype in ("float32", "bfloat16", "float16"):
        student["dtype"] = dtype
    return {"class_path": SETTINGS[hasattr(config, "vision_config")], "init_args": {"student": student}}


def name_of(run: str) -> str:
    """Names a model by the folder of its run, or by that of its checkpoint."""
    path = Path(run).resolve()
    folder = path.parent if path.is_file() else path
    return (folder.parent if folder.name == "checkpoints" else folder).name


class StudentServer(JSONServer):
    """HTTP server of one student; requests advance side by side, token by token.

    Args:
        address: host and port; port 0: any that is free.
        module: setting with its student, as `load` returns it.
        name: of the model.
        limit: bytes of the largest request.
        waiting: requests at once.
    """

    def __init__(self, address: tuple[str, int], module: Any, name: str, limit: int, waiting: int) -> None:
        self.module, self.name, self.turns = module, name, Turns()
        self.policy = module.policies["student"]
        self.context = context_length(self.policy)
        self.rows = bare(self.policy.model).get_input_embeddings().weight.shape[0]
        super().__init__(address, ChatHandler, TOKEN, limit, waiting)

    def acting(self, request: protocol.Request) -> list[Acting]:
        """Prepares the prompts of a request.

        Raises:
            BadRequest: the student can't read one, or it leaves no room in its context.
        """
        prepared = []
        for prompt in request.prompts:
            try:
                acting = self._acting(prompt, request.is_chat)
            except Exception as error:  # of a template or a tokenizer, which may raise anything
                param = "messages" if request.is_chat else "prompt"
                raise protocol.BadRequest(reason_of(error), param) from error
            length = acting.prompts["input_ids"].shape[1]
            if length + (request.max_tokens or 1) > self.context:
                text = f"{length} tokens of the prompt and {request.max_tokens or 1} of the completion are more than "
                raise protocol.BadRequest(f"{text}the context of {self.context}", None, "context_length_exceeded")
            prepared.append(acting)
        return prepared

    def _acting(self, prompt: Any, is_chat: bool) -> Acting:
        if is_chat:
            return acting_on(self.module, self.policy, self.policy, {"prompt": prompt})
        if isinstance(prompt, str):
            example: Example = {"prompt": prompt}
            ids = replace(self.module.renderer(self.policy), raw=True).prompt_ids(example)
        else:
            example, ids = {"prompt": ""}, prompt
            if wrong := [i for i in ids if not 0 <= i < self.rows]:
                raise ValueError(f"{wrong[0]} is no token id: there are those from 0 to {self.rows - 1}")
        tokens = torch.tensor([ids])
        return Acting(self.policy, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, [example])

    def write(
        self, request: protocol.Request, number: int, acting: Acting, completions: list[Completion], hear: Any
    ) -> None:
        """Writes the completions of the prompt ``number``."""
        left = self.context - acting.prompts["input_ids"].shape[1]
        horizon = request.max_tokens or (left if request.is_chat else min(left, protocol.SHORT))
        rollout = replace(request.rollout, horizon=horizon)
        seeds = request.seeds(number)
        stream(self.module, acting, rollout, seeds, request.stops, hear, self.turns, completions)


class ChatHandler(JSONHandler):
    """One request: ``/v1/models``, ``/v1/chat/completions`` or ``/v1/completions``."""

    server: StudentServer

    def do_GET(self) -> None:
        """Answers ``/v1/models`` and ``/v1/models/<name>``."""
        if not self.is_let_in():
            return
        model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "opd-lightning"}
        if self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [model]})
        elif self.path == f"/v1/models/{self.server.name}":
            self.answer(200, model)
        else:
            self.refuse(404, f"there is no {quoted(self.path)} here")

    def do_POST(self) -> None:
        """Answers ``/v1/chat/completions`` and ``/v1/completions``."""
        if not self.is_let_in() or (body := self.body()) is None:
            return
        prompt = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}.get(self.path)
        if prompt is None:
            self.refuse(404, f"there is no {quoted(self.path)} here")
            return
        try:
            self._continue(protocol.read(body, prompt, self.server.name, "images" in self.server.module.reads))
        except protocol.BadRequest as error:
            self.answer(error.status, protocol.error(str(error), error.status, error.param, error.code))
        except Busy as error:
            self.refuse(503, str(error))
        except ConnectionError:
            self.close_connection = True  # nobody reads the answer any more
        except Exception as error:  # of a model, which may raise anything
            sys.stderr.write(printable(f"{type(error).__name__}: {error}\n"))
            self.refuse(500, f"the student ended in {type(error).__name__}")

    def _continue(self, request: protocol.Request) -> None:
        server = self.server
        if not server.room.acquire(blocking=False):
            raise Busy("too many requests wait here already")
        try:
            prepared = server.acting(request)
            counted = sum(acting.prompts["input_ids"].shape[1] for acting in prepared)
            completions = [c for a in prepared for c in begun(server.module, a.policy, request.n, request.stops)]
            if request.streams:
                self._stream(request, prepared, completions, counted)
                return
            for number, acting in enumerate(prepared):
                own = completions[number * request.n : (number + 1) * request.n]
                server.write(request, number, acting, own, lambda: None)
            self.answer(200, protocol.answer(request, server.name, completions, counted))
        finally:
            server.room.release()

    def _stream(
        self, request: protocol.Request, prepared: list[Acting], completions: list[Completion], counted: int
    ) -> None:
        """Answers in events, as texts become certain; whoever goes away ends the writing."""
        # 1. from here on errors are events
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        name = self.server.name
        for index in range(len(completions)) if request.is_chat else ():
            self._event(protocol.piece(request, name, index, None))

        # 2. what is new after each step
        def hear() -> None:
            for index, completion in enumerate(completions):
                if text := completion.take():
                    self._event(protocol.piece(request, name, index, text))

        try:
            for number, acting in enumerate(prepared):
                own = slice(number * request.n, (number + 1) * request.n)
                self.server.write(request, number, acting, completions[own], hear)
            hear()
            for index, completion in enumerate(completions):
                self._event(protocol.piece(request, name, index, "", completion.reason))
            if request.counts:
                self._event(protocol.last_piece(request, name, protocol.usage(counted, completions)))
        except ConnectionError:
            return
        except Exception as error:  # of a model, which may raise anything
            sys.stderr.write(printable(f"{type(error).__name__}: {error}\n"))
            self._event(protocol.error(f"the student ended in {type(error).__name__}", 500))
        # 3. the end
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")
        self.wfile.flush()

    def refuse(self, code: int, text: str) -> None:
        self.answer(code, protocol.error(text, code))
