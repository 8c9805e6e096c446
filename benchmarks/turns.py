"""Episodes of eight turns beside one rollout of the same total length: ``python benchmarks/turns.py [--repeats N]
[--threads N]`` prints what it finds and writes runs/bench/turns.json.

Both are `model.act` of one Qwen3 (random weights, float32) on 32 prompts, in alternating order; times are medians of
CPU seconds, which other work changes least, ratios medians of the rounds' ratios. In an episode a turn of
24 tokens is written (the last of them is made the stop token) and answered by 8 tokens, eight times; the one rollout
writes all 248, for behind the last turn nothing is observed. `read` counts the tokens that the episodes' policy read,
as `train/read` does, and `seen` those that its embedding saw, padding included. `least` is every token of prompts and
episodes once, but for the last of each, which nobody reads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_lightning import Environment, Rollout
from opd_lightning.modalities.autoregressive.engines import Prompts
from opd_lightning.modalities.autoregressive.engines.decode_loop import DecodeLoop
from opd_lightning.modalities.autoregressive.engines.engine import Conversation
from opd_lightning.modalities.autoregressive.observing import Heard
from opd_lightning.modalities.text import TextDistillation
from opd_lightning.modalities.text.quickstart import character_tokenizer
from opd_lightning.objective import CrossEntropy, Objective, Term
from opd_lightning.policy import Policy
from opd_lightning.pretrained import Pretrained

RESULT = Path("runs/bench/turns.json")
EPISODES, TURNS, WRITTEN, OBSERVED = 32, 8, 24, 8
LENGTH = TURNS * WRITTEN + (TURNS - 1) * OBSERVED
STOP = 511  # an id that nobody draws: the tokenizer does not know it


class Answers(Environment):
    """Answers to every turn by as many characters."""

    def step(self, state: Any, text: str) -> str:
        return "1+" * (OBSERVED // 2)


class Turn(Conversation):
    """Conversation whose turns all have the same length: the last token of each becomes the stop token."""

    def __init__(self, inner: Conversation) -> None:
        self.inner = inner

    @property
    def read(self) -> list[int]:  # type: ignore[override]
        return self.inner.read

    def write(self, rows: list[int], heard: list[Heard], rollout: Rollout, seeds: list[int], ended: Any = None) -> Any:
        # nobody is told of a turn's end before it is made one
        written, log_probs = self.inner.write(rows, heard, replace(rollout, horizon=WRITTEN), seeds)
        written[:, -1] = STOP
        return written, log_probs


class Equal(DecodeLoop):
    """Engine of turns of the same length."""

    def begin(self, policy: Policy, head: Any, prompts: Prompts, eos: list[int], pad: int) -> Conversation:
        return Turn(super().begin(policy, head, prompts, eos, pad))


def student(folder: Path) -> Path:
    """Writes a model and a tokenizer."""
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    config = Qwen3Config(
        vocab_size=STOP + 1,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def acting(path: Path, environment: Environment | None, engine: DecodeLoop) -> TextDistillation:
    module = TextDistillation(
        student=Pretrained(str(path)),
        teachers={},
        objective=Objective([Term(CrossEntropy(), teacher=None)]),
        environment=environment,
        engine=engine,
        rollout=Rollout(horizon=LENGTH, turns=TURNS if environment else None),
    )
    module.configure_model()
    module.eos = [STOP]
    return module


def measure(path: Path, repeats: int) -> dict[str, Any]:
    # 1. the sides, each once before it is timed
    rows = [{"prompt": f"{number:04d}+{9999 - number}="} for number in range(EPISODES)]
    modules = {
        "turns": acting(path, Answers(), Equal()),
        "one": acting(path, None, DecodeLoop()),
    }

    def act(name: str) -> Any:
        return modules[name].act("student", rows, list(range(EPISODES)), modules[name].rollout)

    counted = {name: count(modules[name], lambda name=name: act(name)) for name in modules}
    # 2. in turns
    times: dict[str, list[float]] = {name: [] for name in modules}
    for turn in range(repeats):
        for name in list(modules)[:: 1 if turn % 2 else -1]:
            began = time.process_time()
            act(name)
            times[name].append(time.process_time() - began)
    ratio = median(a / b for a, b in zip(times["turns"], times["one"], strict=True))
    return {
        "counted": counted,
        "cpu_seconds": {name: median(values) for name, values in times.items()},
        "turns_against_one": round(ratio, 3),
        "all_cpu_seconds": times,
    }


def count(module: TextDistillation, act: Callable[[], Any]) -> dict[str, int]:
    """Counts what a rollout has and reads; a first one, in which the model is tried out, is not counted."""
    act()
    seen: list[int] = []

    def watch(_: Any, inputs: tuple[Tensor, ...], __: Any) -> None:
        seen.append(inputs[0].numel())

    embedding = module.policies["student"].model.get_input_embeddings()
    handle = embedding.register_forward_hook(watch)
    trajectories = act()
    handle.remove()
    prompt = int(trajectories.observation["attention_mask"].sum())
    steps = int(trajectories.extent.sum())
    facts = {"prompt": prompt, "steps": steps, "least": prompt + steps - EPISODES, "seen": sum(seen)}
    if "turn" in trajectories.channels:
        facts["turns"] = 1 + int(trajectories.channels["turn"].max())
        facts["read"] = int(trajectories.channels["read"].sum())
    return facts


def main(repeats: int, threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        found = {"threads": torch.get_num_threads(), **measure(student(Path(folder)), repeats)}
    print(json.dumps({k: v for k, v in found.items() if k != "all_cpu_seconds"}), flush=True)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    main(given.repeats, given.threads)
