"""Rollouts by a vLLM server, over HTTP: token ids in, token ids and log-probs out, a new adapter when it has changed.

Shape legend: B trajectories, P prompt width (left padded), T horizon.
"""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor

from ....distribution import Head
from ....heart import HEART
from ....policy import Policy, evaluating
from ....printable import printable, quoted
from ....rollout_settings import Rollout
from ..models import bare
from .decode_loop import DecodeLoop
from .engine import Prompts, RolloutEngine

Weights = dict[str, Tensor]
COMPARED = 32  # tokens of a trajectory whose log-probs are compared: logits of whole rollouts would take too much


class VllmServer(RolloutEngine):
    """Engine that writes with the student's LoRA adapter in a server that was started beforehand:

        VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank RANK

    with the student's own rank, on which the server's speed depends. Whenever the adapter has changed it is saved to
    ``folder`` and loaded by the server under a new name, so that no key or value that was computed with the old one can
    be used; the old one is unloaded, and at the end of the run the last one. Then log-probs that the server returns are
    compared with the student's own. Teachers that act are handed to `DecodeLoop`.

    Only what a plain server documents is used: ``/v1/load_lora_adapter``, ``/v1/unload_lora_adapter`` and
    ``/v1/completions``; docs/vllm.md says what else there is, and what was tried. The server must return log-probs
    before temperature and filters (``--logprobs-mode raw_logprobs``, its default). It knows nothing of rows of the head
    beyond the tokenizer's ids: they count in its log-probs, and one that is sampled ends the run. Its draws depend on
    the seed of each request and, as far as its kernels do, on who shares its batch.

    Args:
        url: such as ``http://localhost:8000``.
        folder: where adapters are written; the server must see it under the same path.
        tolerance: mean absolute difference of log-probs, in nats, beyond which server and student are different models.
            Default 0.05, ours.
        checked: trajectories compared after a change. Default 4.
        at_once: requests in flight. Default 256.
        timeout: seconds for one request. Default 600.

    Raises:
        ValueError: a value out of range; when asked to write: a model without exactly one active LoRA adapter, prompts
            with more than text, tokens that must not be sampled.
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
        self._own, self._number = f"opd-{uuid.uuid4().hex[:8]}", 0  # ranks and runs may share a server
        self._loaded: Weights = {}

    @property
    def adapter(self) -> str:
        """Name under which the server has the student's adapter."""
        return f"{self._own}-{self._number}"

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
        # 2. the adapter, then a request for each row, all at once
        changed = self._sync(model)
        rows = zip(inputs["input_ids"].cpu(), inputs["attention_mask"].bool().cpu(), strict=True)
        asked = [
            self._request(ids[mask].tolist(), rollout, seed, eos) for (ids, mask), seed in zip(rows, seeds, strict=True)
        ]
        with HEART.waiting_for("server"), ThreadPoolExecutor(min(self.at_once, len(asked))) as threads:
            answers = list(threads.map(self._complete, asked))
        # 3. answers, which are compared when the adapter is a new one
        width = max(len(tokens) for tokens, _ in answers)
        tokens = torch.tensor([row + [pad] * (width - len(row)) for row, _ in answers])
        log_probs = torch.tensor([row + [0.0] * (width - len(row)) for _, row in answers])
        if int(tokens.max()) >= head.vocabulary:
            raise RuntimeError(f"the server sampled id {int(tokens.max())}; the tokenizer has {head.vocabulary}")
        if changed:
            self._compare(model, head, inputs, tokens, log_probs, [len(row) for row, _ in answers])
        device = inputs["input_ids"].device
        return tokens.to(device), log_probs.to(device)

    def _request(self, prompt: list[int], rollout: Rollout, seed: int, eos: list[int]) -> dict[str, Any]:
        """Builds a request that sets everything: the checkpoint's generation defaults would fill in the rest."""
        return {
            "model": self.adapter,
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

    def _complete(self, request: dict[str, Any]) -> tuple[list[int], list[float]]:
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
        return tokens, log_probs

    def _post(self, path: str, body: dict[str, Any]) -> bytes:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                read: bytes = answer.read()
                HEART.beat()
                return read
        except urllib.error.HTTPError as error:
            hint = ""
            if path.endswith("lora_adapter") and error.code == 404:
                hint = "; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
            text = printable(error.read().decode(errors="replace")[:500])
            raise ConnectionError(f"{self.url}{path} answered {error.code}: {text}{hint}") from error
        except OSError as error:
            raise ConnectionError(f"no vLLM server answers at {self.url}{path}: {error}") from error

    def _sync(self, model: Any) -> bool:
        """Loads the student's adapter into the server if it has changed; True if it has."""
        config, weights = _adapter(model)
        if self._loaded.keys() == weights.keys() and all(torch.equal(w, self._loaded[n]) for n, w in weights.items()):
            return False
        old, self._number = self.adapter, self._number + 1
        path = self.folder / self.adapter
        try:
            config.save_pretrained(path)
            save_file(weights, path / "adapter_model.safetensors")
            self._post("/v1/load_lora_adapter", {"lora_name": self.adapter, "lora_path": str(path.absolute())})
        except BaseException:  # the server has the old one yet, if any
            shutil.rmtree(path, ignore_errors=True)
            self._number -= 1
            raise
        if self._loaded:
            self._unload(old)
        self._loaded = weights
        return True

    def _unload(self, adapter: str) -> None:
        shutil.rmtree(self.folder / adapter, ignore_errors=True)
        self._post("/v1/unload_lora_adapter", {"lora_name": adapter})

    def close(self) -> None:
        """Unloads the adapter from the server and removes it from ``folder``."""
        if self._loaded:
            self._loaded = {}
            try:
                self._unload(self.adapter)
            except ConnectionError as error:
                rank_zero_warn(f"{printable(error)}; if it is still there, it keeps the adapter {self.adapter}")

    @torch.no_grad()
    def _compare(
        self,
        model: Any,
        head: Head,
        inputs: dict[str, Tensor],
        tokens: Tensor,
        server_log_probs: Tensor,
        lengths: list[int],
    ) -> None:
        """Refuses a server whose log-probs are not the student's.

        Raises:
            RuntimeError: they are more than `tolerance` apart on average.
        """
        few, width = slice(self.checked), min(tokens.shape[1], COMPARED)
        device = inputs["input_ids"].device
        written = torch.arange(width) < torch.tensor(lengths)[few, None]
        ids = torch.cat([inputs["input_ids"][few], tokens[few, :width].to(device)], 1)
        attended = torch.cat([inputs["attention_mask"][few], written.to(device, inputs["attention_mask"].dtype)], 1)
        position = attended.cumsum(1).sub(1).clamp(min=0)
        with evaluating(model):
            logits = model(input_ids=ids, attention_mask=attended, position_ids=position).logits
        log_p = logits[:, -width - 1 : -1, : head.vocabulary].float().log_softmax(-1)
        student = log_p.gather(-1, ids[:, -width:, None]).squeeze(-1).cpu()[written]
        server = server_log_probs[few, :width][written]
        apart = float((student - server).abs().mean())
        # so NaN is refused, too
        if not apart <= self.tolerance:
            raise RuntimeError(
                f"{self.url} does not sample from the student: over {len(student)} tokens the mean log-prob is "
                f"{float(server.mean()):.4f} there and {float(student.mean()):.4f} here, {apart:.4f} apart on average, "
                f"more than VllmServer.tolerance={self.tolerance}. Does it serve the same base model, in the same "
                "precision, with --logprobs-mode raw_logprobs?"
            )


def _adapter(model: Any) -> tuple[Any, Weights]:
    """Copies configuration and weights of the one adapter that is switched on, named as PEFT saves them."""
    active = {name for m in model.modules() if isinstance(m, BaseTunerLayer) for name in m.active_adapters}
    if len(active) != 1:
        raise ValueError(
            f"VllmServer is for a student with one LoRA adapter, since only adapters can be replaced in a running "
            f"server; this model has {len(active)}. Set student.lora"
        )
    (name,) = active
    state = get_peft_model_state_dict(model, adapter_name=name)
    # copies: training goes on, and the next rollout compares with these
    weights = {f"base_model.model.{key}": weight.detach().cpu().clone() for key, weight in state.items()}
    return model.peft_config[name], weights
