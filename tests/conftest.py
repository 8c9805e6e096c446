"""Tiny models of real architectures, built from their configurations, with tokenizers made on the spot."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from opd_lightning.modalities.text.sums import character_tokenizer  # noqa: E402

torch.set_num_threads(2)


def save_qwen3(folder: Path, seed: int, hidden: int = 32, rows: int = 24) -> Path:
    """A model folder: random weights, a character tokenizer, and a head with a few rows more than it has tokens."""
    torch.manual_seed(seed)
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=max(rows, len(tokenizer)),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("student"), seed=1)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("teacher"), seed=2, hidden=48, rows=28)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """40 small sums as JSONL, with the columns that views and rewards read."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {"prompt": f"{a}+{b}=", "answer": str(a + b), "completion": str(a + b), "solution": f"{a}+{b}"}
        for a in range(8, 16)
        for b in (3, 14, 15, 92, 65)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
