"""Rollouts by vLLM servers, over HTTP: token ids in, token ids and log-probs out, new weights when they have changed.

Shape legend: B trajectories, P prompt width (left padded), T horizon.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from ....distribution import Head
from ....heart import HEART
from ....policy import Policy, evaluating
from ....printable import printable
from ....rollout_settings import Rollout
from ..models import bare
from .decode_loop import DecodeLoop
from .engine import Prompts, RolloutEngine
from .replica import Completed, Replica, Unfit
from .served_weights import ServedWeights, served

COMPARED = 32  # tokens of a trajectory whose log-probs are compared: logits of whole rollouts would take too much
PROBED = 8  # tokens that are written once more behind a prompt which the server had read with other weights


class VllmServer(RolloutEngine):
    """Engine that writes with the student's weights in servers that were started beforehand, for LoRA by

        VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank RANK

    with the student's own rank, on which the server's speed depends, and for a student that trains all its weights by

        VLLM_SERVER_DEV_MODE=1 vllm serve BASE

    Whenever the weights have changed they are saved to ``folder``, from where the servers take them: an adapter under a
    new name, whole weights in place of their own. Then log-probs that a server returns are compared with the student's,
    those behind a prompt that it had read before, too. Teachers that act are handed to `DecodeLoop`.

    Several servers share a batch, in pieces of neighbors, so that a group's prompt is read by one of them. One that
    does not answer is left out and the others write its rows; so is one whose answers are malformed, or whose log-probs
    are not the student's, as those of one that was started again. With the next generation batch it is asked whether it
    is there, and gets the weights of then; one that fails again, after pauses that double from 10 seconds to 10
    minutes. Where none is left, the run ends. A trajectory depends on its seed, not on which of them wrote it,
    as far as their kernels give the same.

    Only what a plain server has is used: ``/v1/load_lora_adapter``, ``/v1/unload_lora_adapter``, ``/collective_rpc``
    (``reload_weights``), ``/reset_prefix_cache``, ``/v1/models`` and ``/v1/completions``; docs/vllm.md says what else
    there is, and what was tried. A server must return log-probs before temperature and filters (``--logprobs-mode
    raw_logprobs``, its default). It knows nothing of rows of the head beyond the tokenizer's ids: they count in its
    log-probs, and one that is sampled ends the run. Its draws depend on the seed of each request and, as far as its
    kernels do, on who shares its batch.

    Args:
        url: such as ``http://localhost:8000``, or a list of them; tokens for them are in ``VLLM_API_KEY``.
        folder: where weights are written; each server must see it under the same path.
        tolerance: mean absolute difference of log-probs, in nats, beyond which server and student are different models.
            Default 0.05, ours.
        checked: trajectories of each generation batch that are compared, of each server, at most. Default 4.
        at_once: requests in flight, to each server. Default 256.
        timeout: seconds for one request. Default 600.

    Raises:
        ValueError: a value out of range; when asked to write: a model with several active LoRA adapters, or without
            one and quantized; prompts with more than text, tokens that must not be sampled.
        ConnectionError: no server answers, or each with an error.
        Unfit: a RuntimeError: the last server's log-probs are not the student's, or its completions are malformed or
            end otherwise than they may.
    """

    def __init__(
        self,
        url: str | list[str],
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
        self.replicas = [Replica(each, timeout) for each in ([url] if isinstance(url, str) else url)]
        if not self.replicas or len({replica.url for replica in self.replicas}) < len(self.replicas):
            raise ValueError(f"VllmServer: url={url} must name one server, or several different ones")
        self.folder, self.tolerance, self.checked, self.at_once = Path(folder), tolerance, checked, at_once
        self._weights: ServedWeights | None = None

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
        attended = zip(inputs["input_ids"].cpu(), inputs["attention_mask"].bool().cpu(), strict=True)
        read = [ids[mask].tolist() for ids, mask in attended]
        asked = [_request(prompt, rollout, seed, eos) for prompt, seed in zip(read, seeds, strict=True)]
        # 2. each row is written by a server that answers; what one leaves is for the others
        self._weights = weights = self._weights or served(model, self.folder)
        self._take_back()
        rows: dict[int, Completed] = {}
        while left := [i for i in range(len(asked)) if i not in rows]:
            rows |= self._share(model, head, weights, {i: asked[i] for i in left})
        # 3. as tensors
        written = [rows[i] for i in range(len(asked))]
        width, device = max(len(row.tokens) for row in written), inputs["input_ids"].device
        tokens = torch.tensor([row.tokens + [pad] * (width - len(row.tokens)) for row in written])
        log_probs = torch.tensor([row.log_probs + [0.0] * (width - len(row.log_probs)) for row in written])
        return tokens.to(device), log_probs.to(device)

    def _take_back(self) -> None:
        """Asks servers that were left out whether they are there; those that fail again and again, ever more rarely."""
        present, now = any(not replica.left_out for replica in self.replicas), time.monotonic()
        due = [replica for replica in self.replicas if replica.left_out and (now >= replica.again_at or not present)]
        if due:
            with ThreadPoolExecutor(len(due)) as threads:
                for replica, answers in zip(due, threads.map(Replica.answers, due), strict=True):
                    if answers:
                        warn(f"{replica.url} answers again, and writes as before ({replica.failures})", stacklevel=2)

    def _share(
        self, model: Any, head: Head, weights: ServedWeights, asked: dict[int, dict[str, Any]]
    ) -> dict[int, Completed]:
        """Has each server that is there write a piece of neighbors; returns rows of those that wrote as the student.

        Raises:
            ConnectionError: no server is left.
            Unfit: none that writes as the student would.
        """
        # 1. servers that have the weights
        present = [replica for replica in self.replicas if not replica.left_out]
        if not present:
            urls = ", ".join(replica.url for replica in self.replicas)
            raise ConnectionError(f"no vLLM server answers of {urls}, which were left out before")
        for replica, error in weights.sync(model, present).items():
            self._leave_out(replica, error)
        present = [replica for replica in present if not replica.left_out]
        # 2. their pieces, at the same time
        indices, size = list(asked), math.ceil(len(asked) / len(present))
        pieces = {replica: indices[i * size : (i + 1) * size] for i, replica in enumerate(present)}
        pieces = {replica: piece for replica, piece in pieces.items() if piece}
        with HEART.waiting_for("server"), ThreadPoolExecutor(len(pieces)) as threads:
            futures = {
                replica: threads.submit(self._piece, replica, weights, [asked[i] for i in piece])
                for replica, piece in pieces.items()
            }
        # 3. each server is compared with the student in each batch, since it may have been started again meanwhile
        rows: dict[int, Completed] = {}
        for replica, future in futures.items():
            written, again, failure = future.result()
            done = {i: row for i, row in zip(pieces[replica], written, strict=True) if row is not None}
            try:
                self._check(model, head, replica, [*done.values()], again)
                rows |= done
            except Unfit as other:
                failure = other
            if failure is None:
                replica.failures = 0
            else:
                self._leave_out(replica, failure)
        return rows

    def _piece(
        self, replica: Replica, weights: ServedWeights, asked: list[dict[str, Any]]
    ) -> tuple[list[Completed | None], Completed | None, Exception | None]:
        """Asks one server for completions, at once; returns them as far as they came, the one behind a prompt that it
        read with other weights, where there is one, and what kept the others."""
        failure: Exception | None = None

        def complete(request: dict[str, Any]) -> Completed | None:
            nonlocal failure
            if failure is None:  # else those that wait would each wait in vain
                try:
                    return replica.complete(request | {"model": weights.name(replica)})
                except (ConnectionError, Unfit) as first:
                    failure = first
            return None

        probe = []
        if replica.unproven:
            probe = [asked[0] | {"prompt": replica.read, "max_tokens": min(PROBED, asked[0]["max_tokens"])}]
        with ThreadPoolExecutor(min(self.at_once, len(asked) + len(probe))) as threads:
            written = list(threads.map(complete, [*asked, *probe]))
        replica.read = max((request["prompt"] for request in asked), key=len)
        return written[: len(asked)], written[-1] if probe else None, failure

    def _leave_out(self, replica: Replica, error: Exception) -> None:
        """Goes on without a server, until it answers.

        Raises:
            Exception: the error, since it was the last one.
        """
        replica.fail()
        present = sum(not each.left_out for each in self.replicas)
        if not present:
            raise error
        # numbered, since equal warnings are shown once; of every rank, whose servers may be others
        warn(
            f"{replica.url} is left out ({replica.failures}) until it answers again, and its rows are written by the "
            f"other {present}: {printable(error)}",
            stacklevel=2,
        )

    def close(self) -> None:
        """Unloads the adapter from the servers and leaves nothing in ``folder``."""
        if self._weights is not None:
            self._weights.close(self.replicas)

    def _check(self, model: Any, head: Head, replica: Replica, rows: list[Completed], again: Completed | None) -> None:
        """Refuses what a server wrote that is not what the student would write.

        Raises:
            Unfit: it sampled an id that the tokenizer does not have, or its log-probs are others.
        """
        if largest := [row for row in rows if max(row.tokens) >= head.vocabulary]:
            raise Unfit(f"{replica.url} sampled id {max(largest[0].tokens)}; the tokenizer has {head.vocabulary}")
        if rows:
            self._compare(model, head, replica.url, rows[:: math.ceil(len(rows) / self.checked)])
        if again is not None:
            where = "Behind a prompt that it had read before the last change of weights: "
            self._compare(model, head, replica.url, [again], where)
            replica.unproven = False

    @torch.no_grad()
    def _compare(self, model: Any, head: Head, url: str, rows: list[Completed], where: str = "") -> float:
        """Refuses a server whose log-probs are not the student's; returns how far apart they are on average.

        Raises:
            Unfit: they are more than `tolerance` apart on average.
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
            raise Unfit(
                f"{where}{url} does not sample from the student: over {len(student)} tokens the mean log-prob is "
                f"{float(server.mean()):.4f} there and {float(student.mean()):.4f} here, {apart:.4f} apart on average, "
                f"more than VllmServer.tolerance={self.tolerance}. Does it serve the same base model, in the same "
                "precision, with --logprobs-mode raw_logprobs? (On a CPU vLLM keeps the old head of a model whose head "
                "is its embeddings.)"
            )
        return apart


def _request(prompt: list[int], rollout: Rollout, seed: int, eos: list[int]) -> dict[str, Any]:
    """Builds a request that sets all but the model: the checkpoint's generation defaults would fill in the rest."""
    return {
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
