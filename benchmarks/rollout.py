"""Rollouts by the default engine, by transformers' `generate`, and by a bare loop over the model's cached forward pass:
``python benchmarks/rollout.py [CASE ...] [--repeats N] [--threads N]`` prints what it finds and writes
runs/bench/rollout.json.

All sides have the same Qwen3 (random weights, float32), prompts, seeds and stop ids; engine and `generate` draw the
same tokens, which is checked. They take turns, in alternating order; times are medians, ratios medians of the rounds'
ratios. Tokens are those up to the stop. The cases:

* equal: 32 trajectories of exactly 128 tokens, vocabulary 512.
* ragged: the same, each ending by chance, after half as many on average; also with 64 and 256 trajectories.
* vocabulary: 8 trajectories of 128 tokens, vocabulary 151,936.
* group: 8 trajectories on one prompt of 512 tokens; `apart` is the engine on 8 different prompts of that length.

The bare loop knows nothing of stop ids, seeds or stored log-probs: it goes on to the horizon.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from opd_lightning.distribution import Head
from opd_lightning.modalities.autoregressive.engines import Generate, Prompts, RolloutEngine
from opd_lightning.modalities.autoregressive.engines.decode_loop import DecodeLoop
from opd_lightning.modalities.autoregressive.engines.engine import until_stop
from opd_lightning.policy import Policy
from opd_lightning.rollout_settings import Rollout

RESULT = Path("runs/bench/rollout.json")


@dataclass
class Case:
    """``stops`` ids of the vocabulary end a rollout; the model is close to uniform over all of them."""

    vocabulary: int
    trajectories: int
    prompt: int
    horizon: int = 128
    stops: int = 0
    group: bool = False


CASES = {
    "equal": Case(512, 32, 30),
    "ragged": Case(512, 32, 30, stops=6),
    "ragged_64": Case(512, 64, 30, stops=6),
    "ragged_256": Case(512, 256, 30, stops=6),
    "vocabulary": Case(151_936, 8, 30),
    "group": Case(512, 8, 512, group=True),
}


def student(vocabulary: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    return Qwen3ForCausalLM(config).eval()


def prompts(ids: Tensor) -> Prompts:
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Prompts(tokens, [{} for _ in ids], media=lambda examples: {}, cache_key=lambda example: None)


@torch.no_grad()
def bare_loop(model: Any, ids: Tensor, horizon: int) -> None:
    cache = DynamicCache(config=model.config)
    for _ in range(horizon):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        ids = torch.multinomial(logits.softmax(1), 1)


def measure(case: Case, repeats: int) -> dict[str, Any]:
    model = student(case.vocabulary)
    policy, head = Policy(model), Head(model.lm_head, case.vocabulary)
    apart = torch.randint(5, case.vocabulary, (case.trajectories, case.prompt))
    ids = apart[:1].expand_as(apart).contiguous() if case.group else apart
    stops = list(range(case.vocabulary - case.stops, case.vocabulary)) or [case.vocabulary]
    rollout, seeds = Rollout(horizon=case.horizon), list(range(case.trajectories))

    def write(engine: RolloutEngine, ids: Tensor) -> tuple[Tensor, Tensor]:
        return engine.write(policy, head, prompts(ids), rollout, seeds, stops, 0)

    sides: dict[str, Callable[[], Any]] = {
        "engine": partial(write, DecodeLoop(), ids),
        "generate": partial(write, Generate(), ids),
        "bare loop": partial(bare_loop, model, ids, case.horizon),
    }
    if case.group:
        sides["apart"] = partial(write, DecodeLoop(), apart)
    (mine, _), (theirs, _) = sides["engine"](), sides["generate"]()
    mask, _ = until_stop(mine, stops)
    assert torch.equal(mine.masked_fill(~mask, 0), theirs.masked_fill(~mask, 0)), "the same tokens"

    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - began)
    written = {"engine": int(mask.sum()), "bare loop": mask.shape[0] * case.horizon}
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    return {
        "tokens": written["engine"],
        "cache_bytes": case.trajectories * (case.prompt + case.horizon) * per_token,
        "seconds": {name: median(values) for name, values in times.items()},
        "tokens_per_s": {n: round(written.get(n, written["engine"]) / median(v)) for n, v in times.items()},
        "engine_is_faster_than": {
            name: round(median(b / a for a, b in zip(times["engine"], values, strict=True)), 2)
            for name, values in times.items()
            if name != "engine"
        },
        "all_seconds": times,
    }


def main(cases: list[str], repeats: int, threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    for name in cases or CASES:
        found[name] = {"threads": torch.get_num_threads(), **measure(CASES[name], repeats)}
        print(name, json.dumps({k: v for k, v in found[name].items() if k != "all_seconds"}), flush=True)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    main(given.cases, given.repeats, given.threads)
