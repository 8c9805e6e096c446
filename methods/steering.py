"""Steered teachers: a direction added to a hidden layer of the student before training, and the ids that it favors.

    python -m opd_lightning.methods.steering MODEL --layer 14 --toward bad.jsonl --away good.jsonl --on good.jsonl

prints the ids for `Support(of: ids)`. Shape legend: n prompts, H hidden size, V ids, T steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..policy import Policy, evaluating
from ..pretrained import Pretrained
from ..shipped import shipped
from ..teacher import Initial, TeacherWeights


class Steered(TeacherWeights):
    """The student before training, with a direction added to what one of its layers reads (SafeSteer, 2606.02530).

    h ← h + strength·d at all positions, d = mean h of some prompts − mean h of others, at their last token, before
    training. The paper's are 160 harmful and 160 harmless ones: its teacher refuses.

    Args:
        layer: number of the layer, 0 the first.
        toward: prompts, or the path of a JSONL file with the column ``prompt``; with a chat template each is a
            user's turn.
        away: likewise.
        strength: factor of d. Default 1 (SafeSteer); 0 is `Initial`.

    Raises:
        ValueError: no prompts on one side; when models are loaded: no such layer.
    """

    stands_still = True

    def __init__(self, layer: int, toward: list[str] | str, away: list[str] | str, strength: float = 1.0) -> None:
        self.layer, self.strength = layer, strength
        self.toward, self.away = read_prompts(toward, "Steered.toward"), read_prompts(away, "Steered.away")

    def attach(self, name: str, student: Policy, load: Callable[[Pretrained], Policy]) -> Policy:
        policy = Initial().attach(name, student, load)
        layer = layer_of(policy.model, self.layer)
        direction = self.strength * (mean_input(policy, layer, self.toward) - mean_input(policy, layer, self.away))

        def shift(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (inputs[0] + direction.to(inputs[0]), *inputs[1:])

        @contextmanager
        def steered() -> Iterator[None]:
            with policy.active(), hooked(layer, shift):
                yield

        return replace(policy, active=steered, cache={})


def read_prompts(prompts: list[str] | str, key: str) -> list[str]:
    """Returns prompts as they are, or those of a JSONL file.

    Raises:
        ValueError: there is none, or a row without.
    """
    if isinstance(prompts, str):
        path = Path(shipped(prompts))
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if wrong := [i for i, row in enumerate(rows, 1) if not isinstance(row.get("prompt"), str)]:
            raise ValueError(f"{key}: {path}, row {wrong[0]}: there is no text in the column 'prompt'")
        prompts = [row["prompt"] for row in rows]
    if not prompts:
        raise ValueError(f"{key} names no prompts")
    return prompts


def layer_of(model: nn.Module, number: int) -> nn.Module:
    """Finds a layer of a transformers model by its number, with or without adapters.

    Raises:
        ValueError: it has no such layer.
    """
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    depth = int(bare.config.get_text_config().num_hidden_layers)
    lists = (part for part in bare.get_decoder().modules() if isinstance(part, nn.ModuleList) and len(part) == depth)
    layers = next(lists, None)
    if layers is None or not 0 <= number < depth:
        raise ValueError(f"Steered.layer={number}: {type(bare).__name__} has the layers 0 to {depth - 1}")
    return layers[number]


@contextmanager
def hooked(layer: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], Any]) -> Iterator[None]:
    """Calls ``hook`` with what the layer reads, within a block."""
    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def mean_input(policy: Policy, layer: nn.Module, prompts: Sequence[str]) -> Tensor:
    """Computes the mean ``[H]`` of what a layer reads at the last token of each of n prompts, in float32."""
    inputs: list[Tensor] = []
    with policy.active(), evaluating(policy.model), hooked(layer, lambda _, read: inputs.append(read[0][0, -1])):
        for prompt in prompts:
            policy.model(input_ids=token_ids(policy, prompt), use_cache=False)
    return torch.stack(inputs).float().mean(0)


def token_ids(policy: Policy, prompt: str) -> Tensor:
    """Tokenizes a prompt ``[1, T]``: as a user's turn, where there is a chat template."""
    tokenizer = getattr(policy.processor, "tokenizer", policy.processor)
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template, return_tensors="pt").input_ids
    return ids.to(next(policy.model.parameters()).device)


def favored(gains: Iterable[Tensor], each: int, count: int) -> list[int]:
    """Lists the ``count`` ids that are most often among the ``each`` of a step with the largest gain.

    Args:
        gains: log q − log p ``[T, V]`` of some texts, q steered and p not.
        each: ids of a step that get a vote.
        count: ids that are elected; of equally many votes the lower id.
    """
    votes: Tensor | int = 0
    for gain in gains:
        chosen = gain.topk(min(each, gain.shape[-1])).indices
        votes = votes + torch.bincount(chosen.flatten(), minlength=gain.shape[-1])
    assert isinstance(votes, Tensor)
    return sorted(votes.argsort(descending=True, stable=True)[:count].tolist())


@torch.no_grad()
def gains(teacher: Policy, prompt: str, rollouts: int, steps: int) -> Iterator[Tensor]:
    """Yields log q − log p ``[T, V]`` of the first steps of rollouts of a steered teacher."""
    ids = token_ids(teacher, prompt)
    model: Any = teacher.model
    for _ in range(rollouts):
        with teacher.active(), evaluating(model):
            text = model.generate(input_ids=ids, do_sample=True, top_k=0, max_new_tokens=steps)
            steered = model(input_ids=text).logits
        plain = model(input_ids=text).logits
        states = slice(ids.shape[1] - 1, text.shape[1] - 1)
        yield steered[0, states].log_softmax(-1) - plain[0, states].log_softmax(-1)


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # 1. what is asked for; the defaults are SafeSteer's for Qwen
    parser = argparse.ArgumentParser(description="Print the ids that a steered model favors on other prompts.")
    parser.add_argument("model", help="path of a transformers model")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--toward", required=True, help="JSONL file with the column prompt")
    parser.add_argument("--away", required=True, help="likewise")
    parser.add_argument("--on", required=True, help="likewise: what the steered model answers")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--rollouts", type=int, default=8, help="of each prompt")
    parser.add_argument("--steps", type=int, default=7, help="of each rollout")
    parser.add_argument("--each", type=int, default=200, help="ids of a step that get a vote")
    parser.add_argument("--ids", type=int, default=50, help="that are elected")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # 2. the steered model, and what it favors
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    student = Policy(model, AutoTokenizer.from_pretrained(options.model))
    weights = Steered(options.layer, options.toward, options.away, options.strength)
    teacher = weights.attach("teacher", student, lambda _: student)
    prompts = read_prompts(options.on, "--on")
    of_rollouts = (gain for prompt in prompts for gain in gains(teacher, prompt, options.rollouts, options.steps))
    print(f"ids: {favored(of_rollouts, options.each, options.ids)}")


if __name__ == "__main__":
    main()
