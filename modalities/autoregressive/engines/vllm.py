"""Rollouts by a vLLM server, over HTTP: token ids in, token ids and log-probs out, new weights when they have changed.

Shape legend: B trajectories, P prompt width (left padded), T horizon.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....distribution import Head
from ....heart import HEART
from ....policy import Policy, evaluating
from ....printable import printable, quoted
from ....rollout_settings import Rollout
from ..models import bare
from .decode_loop import DecodeLoop
from .engine import Prompts, RolloutEngine
from .served_weights import ServedWeights, served

COMPARED = 32  # tokens of a trajectory whose log-probs are compared: logits of whole rollouts would take too much
PROBED = 8  # tokens that are written once more behind a prompt which the server had read with other weights

STARTED_WITH = {
    "/v1/load_lora_adapter": "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora",
    "/collective_rpc": "VLLM_SERVER_DEV_MODE=1, without which it takes no weights",
    "/reset_prefix_cache": "VLLM_SERVER_DEV_MODE=1, without which it takes no weights",
}


class Completed(NamedTuple):
    """Ids of a prompt and of what the server wrote behind it, with the log-prob of each of these."""

    prompt: list[int]
    tokens: list[int]
    log_probs: list[float]


class VllmServer(RolloutEngine):
    """Engine that writes with the student's weights in a server that was started beforehand, for LoRA by

        VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank RANK

    with the student's own rank, on which the server's speed depends, and for a student that trains all its weights by

        VLLM_SERVER_DEV_MODE=1 vllm serve BASE

    Whenever the weights have changed they are saved to ``folder``, from where the server takes them: an adapter under a
    new name, whole weights in place of its own. Then log-probs that the server returns are compared with the student's,
    those behind a prompt that it had read before, too. Teachers that act are handed to `DecodeLoop`.

    Only what a plain server has is used: ``/v1/load_lora_adapter``, ``/v1/unload_lora_adapter``, ``/collective_rpc``
    (``reload_weights``), ``/reset_prefix_cache``, ``/v1/models`` and ``/v1/completions``; docs/vllm.md says what else
    there is, and what was tried. The server must return log-probs before temperature and filters (``--logprobs-mode
    raw_logprobs``, its default). It knows nothing of rows of the head beyond the tokenizer's ids: they count in its
    log-probs, and one that is sampled ends the run. Its draws depend on the seed of each request and, as far as its
    kernels do, on who shares its batch.

    Args:
        url: such as ``http://localhost:8000``.
        folder: where weights are written; the server must see it under the same path.
        tolerance: mean absolute difference of log-probs, in nats, beyond which server and student are different models.
            Default 0.05, ours.
        checked: trajectories of each generation batch that are compared. Default 4.
        at_once: requests in flight. Default 256.
        timeout: seconds for one request. Default 600.

    Raises:
        ValueError: a value out of range; when asked to write: a model with several active LoRA adapters, or without
            one and quantized; prompts with more than text, tokens that must not be sampled.
        ConnectionError: no answer, or one that is an error.
        RuntimeError: the server's log-probs are not the student's; a completion that ends otherwise than it may.
    """

    def __init__(
        self,
        url: str,
        folder: str,
        tolerance: float = 0.05,
        checked: int = 4,
        at_once: int = 256,
        timeout: float = 600.0,
    ) -> None:
        if tolerance <= 0 or min(checked, at_once) < 1:
            raise ValueError(
                f"VllmServer: tolerance={tolerance} must be > 0, checked={checked} and at_once={at_once} >= 1"
            )
        self.url, self.folder, self.timeout = url.rstrip("/"), Path(folder), timeout
        self.tolerance, self.checked, self.at_once = tolerance, checked, at_once
        self._weights: ServedWeights | None = None
        self._read: list[int] = []  # the longest prompt of the generation batch before

    @property
    def model(self) -> str:
        """Name under which the server has the student."""
        assert self._weights is not None, "nothing was written yet"
        return self._weights.name or self._base

    @cached_property
    def _base(self) -> str:
        """Name of the model that the server was started with."""
        models = json.loads(self._ask("/v1/models", None))["data"]
        return next(str(model["id"]) for model in models if not model.get("parent"))

    def refusal(self, policy: Policy) -> str | None:
        return None if policy.name == "student" else "not the student"

    def write(
        self, policy: Policy, head: Head, prompts: Prompts, rollout: Rollout, seeds: list[int], eos: list[int], pad: int
    ) -> tuple[Tensor, Tensor]:
        if self.refusal(policy) is not None:
            return DecodeLoop().write(policy, head, prompts, rollout, seeds, eos, pad)
        # 1. refusals
        model = bare(policy.model)
        inputs = prompts.inputs(range(len(seeds)), next(model.parameters()).device)
        if extra := set(inputs) - {"input_ids", "attention_mask"}:
            raise ValueError(f"VllmServer is for prompts of text; these have {', '.join(sorted(extra))}, too")
        if head.suppressed is not None:
            raise ValueError("VllmServer can't keep tokens from being sampled whose log-probs it counts")
        # 2. the weights, then a request for each row, all at once
        self._weights = self._weights or served(model, self._post, self.folder)
        changed = self._weights.sync(model)
        attended = zip(inputs["input_ids"].cpu(), inputs["attention_mask"].bool().cpu(), strict=True)
        read = [ids[mask].tolist() for ids, mask in attended]
        asked = [self._request(prompt, rollout, seed, eos) for prompt, seed in zip(read, seeds, strict=True)]
        if changed and self._read:
            asked.append(self._request(self._read, rollout, 0, eos) | {"max_tokens": min(PROBED, rollout.horizon)})
        with HEART.waiting_for("server"), ThreadPoolExecutor(min(self.at_once, len(asked))) as threads:
            written = list(threads.map(self._complete, asked))
        rows, again = written[: len(read)], written[len(read) :]
        self._read = max(read, key=len)
        # 3. answers; the server may have been started again meanwhile, so that each batch is compared
        if (largest := max(max(row.tokens) for row in written)) >= head.vocabulary:
            raise RuntimeError(f"the server sampled id {largest}; the tokenizer has {head.vocabulary}")
        self._compare(model, head, rows[: self.checked])
        if again:
            self._compare(model, head, again, "Behind a prompt that it had read before the last change of weights: ")
        width, device = max(len(row.tokens) for row in rows), inputs["input_ids"].device
        tokens = torch.tensor([row.tokens + [pad] * (width - len(row.tokens)) for row in rows])
        log_probs = torch.tensor([row.log_probs + [0.0] * (width - len(row.log_probs)) for row in rows])
        return tokens.to(device), log_probs.to(device)

    def _request(self, prompt: list[int], rollout: Rollout, seed: int, eos: list[int]) -> dict[str, Any]:
        """Builds a request that sets everything: the checkpoint's generation defaults would fill in the rest."""
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": rollout.horizon,
            "temperature": rollout.temperature,
            "top_p": rollout.top_p or 1.0,
            "top_k": rollout.top_k or 0,
            "min_p": rollout.min_p or 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
            "stop_token_ids": eos,
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            "skip_special_tokens": False,
        }

    def _complete(self, request: dict[str, Any]) -> Completed:
        (choice,) = json.loads(self._post("/v1/completions", request))["choices"]
        tokens, log_probs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not tokens or log_probs is None or len(tokens) != len(log_probs):
            raise RuntimeError(
                f"{self.url}: a completion without token ids and as many log-probs: {quoted(choice, 200)}"
            )
        stopped = tokens[-1] in request["stop_token_ids"]
        if not stopped and len(tokens) < request["max_tokens"]:
            raise RuntimeError(
                f"{self.url}: a completion ended after {len(tokens)} of {request['max_tokens']} tokens without one of "
                f"the stop tokens {request['stop_token_ids']} (finish_reason {choice.get('finish_reason')!r}); is "
                "--max-model-len too small?"
            )
        return Completed(request["prompt"], tokens, log_probs)

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, data: bytes | None) -> bytes:
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                read: bytes = answer.read()
                HEART.beat()
                return read
        except urllib.error.HTTPError as error:
            hint = ""
            if error.code == 404 and path in STARTED_WITH:
                hint = f"; start it with {STARTED_WITH[path]}"
            text = printable(error.read().decode(errors="replace")[:500])
            raise ConnectionError(f"{self.url}{path} answered {error.code}: {text}{hint}") from error
        except OSError as error:
            raise ConnectionError(f"no vLLM server answers at {self.url}{path}: {error}") from error

    def close(self) -> None:
        """Unloads the adapter from the server and leaves nothing in ``folder``."""
        if self._weights is not None:
            self._weights.close()

    @torch.no_grad()
    def _compare(self, model: Any, head: Head, rows: list[Completed], where: str = "") -> float:
        """Refuses a server whose log-probs are not the student's; returns how far apart they are on average.

        Raises:
            RuntimeError: they are more than `tolerance` apart on average.
        """
        device = next(model.parameters()).device
        sequences = [row.prompt + row.tokens[:COMPARED] for row in rows]
        width = max(len(ids) for ids in sequences)
        ids = torch.tensor([[0] * (width - len(row)) + row for row in sequences], device=device)
        attended = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in sequences], device=device)
        position = attended.cumsum(1).sub(1).clamp(min=0)
        with evaluating(model):
            logits = model(input_ids=ids, attention_mask=attended, position_ids=position).logits
        log_p = logits[:, :-1, : head.vocabulary].float().log_softmax(-1)
        taken = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1).cpu()
        ends = [min(len(row.tokens), COMPARED) for row in rows]
        student = torch.cat([line[-end:] for line, end in zip(taken, ends, strict=True)])
        server = torch.tensor([value for row in rows for value in row.log_probs[:COMPARED]])
        apart = float((student - server).abs().mean())
        # so NaN is refused, too
        if not apart <= self.tolerance:
            raise RuntimeError(
                f"{where}{self.url} does not sample from the student: over {len(student)} tokens the mean log-prob is "
                f"{float(server.mean()):.4f} there and {float(student.mean()):.4f} here, {apart:.4f} apart on average, "
                f"more than VllmServer.tolerance={self.tolerance}. Does it serve the same base model, in the same "
                "precision, with --logprobs-mode raw_logprobs? (On a CPU vLLM keeps the old head of a model whose head "
                "is its embeddings.)"
            )
        return apart
