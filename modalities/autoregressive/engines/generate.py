"""The reference engine and the reference for `draw`: sampling inside transformers' `generate`, reproducible per
trajectory, log-probs kept.

Shape legend: B trajectories, V head rows, T horizon.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ....distribution import Head
from ....policy import Policy, evaluating
from ....rollout_settings import Rollout
from ....sharding import as_forward, is_sharded
from ..models import bare
from .draw import BELOW_ONE, uniforms
from .engine import Prompts, RolloutEngine


class Generate(RolloutEngine):
    """Engine of transformers' own `generate`, for every model that it serves: the reference for all others."""

    runs_the_model = True

    def write(
        self, policy: Policy, head: Head, prompts: Prompts, rollout: Rollout, seeds: list[int], eos: list[int], pad: int
    ) -> tuple[Tensor, Tensor]:
        model = bare(policy.model)
        inputs = prompts.inputs(range(len(seeds)), next(model.parameters()).device)
        return generate(model, head, inputs, rollout, seeds, eos, pad, prompts.written)


class Sampler(LogitsProcessor):
    """Logits processor that draws the next token itself, so that greedy `generate` only appends it.

    Each trajectory has a generator of its own, from which one uniform number per step is drawn: what is sampled
    depends on its seed and its prompt, not on the order of calls or on who shares its batch.

    Args:
        written: steps that were drawn before, with the same seeds.

    Attributes:
        log_probs: per step ``[B]``, at temperature 1 and before the filters.
    """

    def __init__(self, head: Head, rollout: Rollout, seeds: list[int], written: int = 0) -> None:
        self._head, self._temperature = head, rollout.temperature
        self._filters = LogitsProcessorList()
        if rollout.top_k is not None:
            self._filters.append(TopKLogitsWarper(top_k=rollout.top_k))
        if rollout.top_p is not None and rollout.top_p < 1:
            self._filters.append(TopPLogitsWarper(top_p=rollout.top_p))
        if rollout.min_p is not None:
            self._filters.append(MinPLogitsWarper(min_p=rollout.min_p))
        self._uniform = uniforms(seeds, written + rollout.horizon)[:, written:]
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores[:, self._head.vocabulary :] = -torch.inf
        if self._head.suppressed is not None:
            scores[:, self._head.suppressed.to(scores.device)] = -torch.inf
        chosen = self._choose(input_ids, scores)
        self.log_probs.append(scores.gather(1, chosen).squeeze(1) - scores.logsumexp(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def _choose(self, input_ids: Any, scores: Tensor) -> Tensor:
        """Draws ids ``[B, 1]``."""
        if self._temperature == 0:
            return scores.argmax(1, keepdim=True)
        shaped = self._filters(input_ids, scores / self._temperature)
        # its end need not be 1, by rounding
        cumulative = shaped.softmax(1).double().cumsum(1)
        uniform = self._uniform[:, len(self.log_probs), None].to(scores.device)
        point = uniform.clamp(max=BELOW_ONE) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, point, right=True)


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Removes the checkpoint's generation defaults within: a repetition penalty would falsify every stored log-prob."""
    defaults = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults


def generate(
    model: Any,
    head: Head,
    prompts: dict[str, Tensor],
    rollout: Rollout,
    seeds: list[int],
    eos: list[int],
    pad: int,
    written: int = 0,
    **hooks: Any,
) -> tuple[Tensor, Tensor]:
    """Samples tokens ``[B, T']`` and their log-probs ``[B, T']``, T' ≤ horizon; rows that stopped are padded.

    ``hooks``: further arguments of transformers' `generate`, such as a streamer.
    """
    sampler = Sampler(head, rollout, seeds, written)
    config = GenerationConfig(
        max_new_tokens=rollout.horizon, do_sample=False, use_cache=True, eos_token_id=eos, pad_token_id=pad
    )
    with torch.no_grad(), evaluating(model), plain_generation(model):
        write = partial(
            model.generate,
            **prompts,
            generation_config=config,
            logits_processor=LogitsProcessorList([sampler]),
            synced_gpus=is_sharded(model),  # ranks whose rollouts have ended go on until those of all have
            **hooks,
        )
        ids = as_forward(model, write)
    new = ids[:, prompts["input_ids"].shape[1] :]
    return new, torch.stack(sampler.log_probs, 1)[:, : new.shape[1]]
