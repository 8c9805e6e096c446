"""Makes the models of configs/text/tools.yaml: ``make assets-tools``, some minutes on a core.

Both learn conversations with the calculator by cross entropy on what the assistant writes. The teacher has learned to
call it, and to call it again where a call was malformed; the student, a fraction of its size, has mostly learned the
habits of other tools.

The folders that ship went through these stages with other draws, and the student had a habit for the first form, too,
until the last of them: they are right in 100 and 19 % of 256 held-out problems. Made anew by this script, they were
right in 94 and 47 % of what it prints.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd_lightning.modalities.text.calculations import problems, tokenizer

HERE = Path(__file__).parent / "tools"
IGNORED = -100  # of labels
MODELS: dict[str, dict[str, Any]] = {
    "teacher": {
        "sizes": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "head_dim": 16},
        "data": {"lapses": 0.5},
    },
    "student": {
        "sizes": {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 12},
        # it has never seen a call made again: that is what the teacher has to teach
        "data": {"habits": 0.7},
    },
}
BATCH, WARMUP = 32, 20
STAGES = ((4_000, 400, 5e-3, True), (3_000, 250, 4e-3, False), (3_000, 200, 3e-3, True), (3_000, 200, 2e-3, True))
"""Rows, steps, learning rate, and whether it falls to 0: digits are found when it rises again."""


def untrained(sizes: dict[str, Any], of: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(of),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=of.pad_token_id,
        bos_token_id=None,
        eos_token_id=of.eos_token_id,
        **sizes,
    )
    return Qwen3ForCausalLM(config)


def conversation(row: dict[str, Any], of: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Lists the ids of a row, and its labels: the ids of what the assistant writes in the completion."""
    text = of.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False)
    ids = of(text, add_special_tokens=False)["input_ids"]
    asked = of.apply_chat_template(row["prompt"], tokenize=False)
    begin, own = len(of(asked, add_special_tokens=False)["input_ids"]), False
    labels, assistant = [], of.convert_tokens_to_ids("<|assistant|>")
    for place, token in enumerate(ids):
        labels.append(token if own else IGNORED)
        own = (own or (token == assistant and place >= begin)) and token != of.eos_token_id
    return ids, labels


def batch(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    """Pads rows on the right, where nothing that is trained looks: ids and labels ``[B, T]``."""
    width = max(len(ids) for ids, _ in rows)
    return (
        torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
    )


@torch.no_grad()
def right(model: Qwen3ForCausalLM, rows: list[tuple[list[int], list[int]]], pad: int) -> float:
    """Returns the share of conversations all of whose trained tokens are the likeliest ones."""
    ids, labels = batch(rows, pad)
    likeliest = model(ids).logits[:, :-1].argmax(-1)
    return float(((likeliest == labels[:, 1:]) | (labels[:, 1:] == IGNORED)).all(1).float().mean())


def train(model: Qwen3ForCausalLM, number: int, role: str, of: PreTrainedTokenizerFast) -> None:
    # 1. conversations, those of others held out
    (count, steps, rate, falls), draw = STAGES[number], random.Random(number)
    rows = [conversation(row, of) for row in problems(count, seed=number, **MODELS[role]["data"])]
    held_out = [conversation(row, of) for row in problems(128, seed=1, held_out=True)]
    # 2. cross entropy
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1 - step / steps if falls else 1.0)
    )
    for step in range(1, steps + 1):
        ids, labels = batch(draw.sample(rows, BATCH), of.pad_token_id)
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            share = right(model, held_out, of.pad_token_id)
            print(f"{role} {number}: step {step} of {steps}, cross entropy {loss.item():.3f}, right {share:.3f}")


for name in sys.argv[1:] or MODELS:
    known = tokenizer()
    made = untrained(MODELS[name]["sizes"], known)
    for stage in range(len(STAGES)):
        train(made, stage, name, known)
    made.save_pretrained(HERE / name)
    known.save_pretrained(HERE / name)
