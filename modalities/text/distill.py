"""`opd distill`: the commonest job in one line, and the configuration that it stands for."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from ...cli import run
from ...config_file import Text, dump, load, overlaid, read, said
from ...data_source import read_source
from ...finite import check_finite
from ...folder import check_folder
from ...pretrained import Pretrained
from ...printable import printable
from ...rows import LOCATION, BadRows
from ...shipped import shipped
from ..autoregressive.advice import learning_rate

BASE = "opd:text/your_data.yaml"
PROMPTS = ("prompt", "messages", "conversations", "question", "instruction", "problem", "query", "input")
"""Columns that hold prompts in the data sets that people bring, the likeliest first."""
HORIZON, BATCH, VALIDATIONS, HELD_OUT = 512, 16, 5, 64
MICRO_BATCH = 2
"""Trajectories of a forward and backward pass on a GPU; on a CPU passes are cut by tokens (``model.pass_tokens``)."""


def main(arguments: Sequence[str]) -> None:
    """Distills a teacher into a student on a file of prompts: --student MODEL --teacher MODEL --data FILE."""
    options, rest = parser().parse_known_args(arguments)
    config = configuration(options, rest)
    path = check_folder(options.out) / "distill.yaml"
    text = dump(config)
    path.write_text(text, encoding="utf-8")
    again = shlex.join(["opd", "fit", "-c", str(path), *rest])
    sys.stdout.write(printable(f"{text}\n# this is {path}; the same again: {again}\n"))
    sys.stdout.flush()
    if not options.print:
        run(["fit", "-c", str(path), *rest])


def parser() -> argparse.ArgumentParser:
    """Builds the parser of the shorthand; what it does not know is an argument of `opd fit`."""
    built = argparse.ArgumentParser(
        prog="opd distill",
        description=main.__doc__,
        allow_abbrev=False,
        epilog="Every other argument is one of `opd fit`: --model.rollout.temperature=0.8, -c opd:methods/gkd.yaml, "
        "--ckpt_path=last, …",
    )
    built.add_argument("--student", required=True, help="the model that is trained: a folder or a name of the hub")
    built.add_argument("--teacher", required=True, help="the model that it learns from; it reads the same token ids")
    built.add_argument("--data", required=True, help="prompts: .jsonl, .json, .parquet, a folder, or a name of the hub")
    built.add_argument("--out", type=Path, default=Path("runs/distill"), help="the run's folder; default: runs/distill")
    built.add_argument("--lora", type=int, nargs="?", const=32, metavar="RANK", help="train adapters; default rank: 32")
    built.add_argument("--prompt", metavar="COLUMN", help="of the rows; default: prompt, or another that looks like it")
    built.add_argument("--reward", help="measures held-out accuracy: MathVerify, ExactMatch, or my_module.my_function")
    built.add_argument("--steps", type=int, default=100, help="optimizer steps; default: 100")
    built.add_argument("--batch", type=int, help=f"prompts an optimizer step; default: {BATCH}, or all rows if fewer")
    built.add_argument("--horizon", type=int, help=f"new tokens at most; default: {HORIZON}, or half of the context")
    built.add_argument("--lr", type=float, help="learning rate; default: by the student's size (docs/your_data.md)")
    built.add_argument("--print", action="store_true", help="write the configuration, and train nothing")
    return built


def configuration(options: argparse.Namespace, rest: Sequence[str] = ()) -> dict[str, Any]:
    """Fills `BASE` in.

    Args:
        options: what `parser` read.
        rest: further arguments, of which ``--data.train_options…`` are heeded when rows are looked at.

    Raises:
        ValueError: the rows can't be read, or none of their columns looks like a prompt; too few rows.
    """
    # 1. what rows and models say
    if options.steps < 1:
        raise ValueError(f"--steps is {options.steps}; it takes 1 or more")
    check_finite("--lr", options.lr)
    for name in ("batch", "horizon", "lora", "lr"):
        # 0 is no "as you like": that is to leave it out
        if (value := getattr(options, name)) is not None and value <= 0:
            raise ValueError(f"--{name} is {value}; it takes more than 0, or leave it out")
    rows = read_source(options.data, _train_options(rest), "--data", 0, BadRows("--data", "refuse"))
    column = prompt_column(rows, options.prompt)
    held_out = min(HELD_OUT, max(1, len(rows) // 10))
    if len(rows) < 2:
        raise ValueError(f"--data: {options.data} has {len(rows)} row; one to train on and one to hold out are needed")
    size, context = _size(options.student), min(_context(options.student), _context(options.teacher))
    # 2. sizes
    batch = options.batch or min(BATCH, len(rows) - held_out)
    on_gpu = torch.cuda.is_available()
    micro = next(n for n in (MICRO_BATCH, 1) if batch % n == 0)
    accumulate = batch // micro if on_gpu else 1
    between = options.steps // next(n for n in range(VALIDATIONS, 0, -1) if options.steps % n == 0)
    rate = options.lr or learning_rate(size, options.lora is not None)
    # 3. the settings
    student: dict[str, Any] = {"path": options.student}
    if options.lora is not None:
        student["lora"] = {"r": options.lora, "alpha": 2 * options.lora}
    own = {
        "trainer": {
            "default_root_dir": str(options.out),
            **({"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"} if on_gpu else {"accelerator": "cpu"}),
            "max_steps": options.steps,
            "accumulate_grad_batches": accumulate,
            "val_check_interval": between * accumulate,
        },
        "model": {
            "init_args": {
                "student": student,
                "teachers": {"teacher": {"weights": {"init_args": {"pretrained": {"path": options.teacher}}}}},
                "rollout": {"batch_size": batch, "horizon": options.horizon or min(HORIZON, context // 2)},
                "reward": options.reward,
                "optimizer": {"init_args": {"lr": rate}},
            }
        },
        "data": {
            "init_args": {
                "train": options.data,
                "validation": held_out,
                "columns": {"prompt": column},
                "last_answer": "drop" if isinstance(rows[0][column], list) else "refuse",
            }
        },
    }
    return _without_nulls(overlaid(read(shipped(BASE)).values, own))


def _train_options(rest: Sequence[str]) -> dict[str, Any]:
    """Collects ``--data.train_options`` from arguments of `opd fit`."""
    options: dict[str, Any] = {}
    for source in said(list(rest)):
        given = (source.values.get("data") or {}).get("train_options") or {}
        options |= {key: load(str(value)) if isinstance(value, Text) else value for key, value in given.items()}
    return options


def prompt_column(rows: Dataset, named: str | None) -> str:
    """Finds the column that holds prompts."""
    columns = [name for name in rows.column_names if name != LOCATION]
    column = named or next((name for name in PROMPTS if name in columns), None)
    if column is None or column not in columns:
        what = f"there is no column {named!r}" if named else "none of the columns looks like a prompt"
        raise ValueError(f"--data: {what}; name one with --prompt: {', '.join(columns)}")
    return column


def _size(path: str) -> int:
    """Counts the parameters of a model from its configuration."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Pretrained(path).config())
    return sum(parameter.numel() for parameter in model.parameters())


def _context(path: str) -> int:
    """Reads how many tokens a model may read and write."""
    return int(getattr(Pretrained(path).config().get_text_config(), "max_position_embeddings", 2 * HORIZON))


def _without_nulls(values: Any) -> Any:
    """Leaves out what is null, which stands in the template to be seen."""
    if isinstance(values, dict):
        return {key: _without_nulls(value) for key, value in values.items() if value is not None}
    return [_without_nulls(value) for value in values] if isinstance(values, list) else values
