"""Store: answers of teachers in Parquet, written in parts, so that whoever was killed in between goes on.

    folder/about.json          what the answers depend on
    folder/part-00000.parquet  rollouts, and of each teacher what it told of them

Shape legend: n trained steps of a trajectory, k ids told of each, H hidden size.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, concatenate_datasets
from pyarrow import parquet
from safetensors.torch import load, save
from torch import Tensor, nn

from ....data_source import as_arrow
from ....distribution import Head
from .question import Answer, Question

ABOUT, FORMAT = "about.json", 1


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that is either there or not."""
    partial = path.with_suffix(f".{os.getpid()}.partial")  # ranks may write the same file at once
    partial.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(partial, path)


def read_about(folder: Path) -> dict[str, Any]:
    """Reads what the answers of a folder depend on.

    Raises:
        FileNotFoundError: there is no such folder, or nothing was recorded in it.
        ValueError: it was written by another version.
    """
    if not (folder / ABOUT).exists():
        raise FileNotFoundError(f"{folder} holds no recorded answers; `opd score -c … --into {folder}` writes them")
    about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    if about.get("format") != FORMAT:
        raise ValueError(f"{folder} has the format {about.get('format')}, and this version reads {FORMAT}: record anew")
    return about


def part(folder: Path, number: int) -> Path:
    """Names a part."""
    return folder / f"part-{number:05d}.parquet"


def parts(folder: Path) -> list[Path]:
    """Lists the parts that are there."""
    return sorted(folder.glob("part-?????.parquet"))


def write_part(path: Path, columns: dict[str, list[Any]]) -> None:
    """Writes a part, which is either there as a whole or not."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        parquet.write_table(pa.table(columns), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def columns_of(name: str, asked: Sequence[Question | None], told: Sequence[Answer]) -> dict[str, list[Any]]:
    """Lists the columns of a teacher: what it was asked, and its answers, flat."""
    pairs = list(zip(asked, told, strict=True))

    def column(read: Any) -> list[Any]:
        return [None if question is None else read(question, answer) for question, answer in pairs]

    def flat(tensor: Tensor | None, kind: Any) -> Any:
        return None if tensor is None else tensor.flatten().numpy().astype(kind, copy=False)

    return {
        f"{name}.key": column(lambda q, a: q.key),
        f"{name}.actions": column(lambda q, a: np.array(q.actions, np.int32)),
        f"{name}.trained": column(lambda q, a: np.array(q.trained, np.int32)),
        f"{name}.log_probs": column(lambda q, a: flat(a.log_probs, np.float32)),
        f"{name}.ids": column(lambda q, a: flat(a.ids, np.int32)),
        f"{name}.top": column(lambda q, a: flat(a.top, np.float32)),
        f"{name}.hidden": column(lambda q, a: None if a.hidden is None else to_bytes(a.hidden)),
    }


def to_bytes(hidden: Tensor) -> bytes:
    """Packs hidden states; numpy has no bfloat16."""
    return hidden.contiguous().view(torch.uint8).numpy().tobytes()


def from_bytes(packed: bytes, dtype: torch.dtype, width: int) -> Tensor:
    """Unpacks hidden states ``[n, width]``."""
    return torch.frombuffer(bytearray(packed), dtype=dtype).view(-1, width)


class Store:
    """Answers of one teacher, found by their question.

    Args:
        folder: of `opd score`.
        name: of the teacher.
        about: of the folder.
    """

    def __init__(self, folder: Path, name: str, about: dict[str, Any]) -> None:
        self.folder, self.name, self.about = folder, name, about
        tables = [Dataset.from_file(str(as_arrow(file))) for file in parts(folder)]
        self._rows = concatenate_datasets(tables).select_columns(
            [f"{name}.{column}" for column in ("key", "actions", "trained", "log_probs", "ids", "top", "hidden")]
        )
        self._places: dict[str, list[int]] = defaultdict(list)
        for place, key in enumerate(self._rows.with_format("arrow")[f"{name}.key"][:].to_pylist()):
            if key is not None:
                self._places[key].append(place)

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, question: Question) -> Answer | str:
        """Finds the answer to a question, or says why there is none.

        An answer about a longer completion will do, since no step depends on those behind it.
        """
        places = self._places.get(question.key)
        if not places:
            return "its prompt, as this teacher reads it, is not among those that were recorded"
        why = "none of the recorded completions of its prompt begins with it"
        for place in places:
            row = {column.removeprefix(f"{self.name}."): v for column, v in self._rows[place].items()}
            if tuple(row["actions"][: len(question.actions)]) != question.actions:
                continue
            known = {step: i for i, step in enumerate(row["trained"])}
            if question.trained[-1] < len(row["actions"]) and all(step in known for step in question.trained):
                return self._answer(row).at([known[step] for step in question.trained])
            why = "some of its trained steps were not trained when it was recorded"
        return why

    def _answer(self, row: dict[str, Any]) -> Answer:
        steps = len(row["trained"])
        answer = Answer(torch.tensor(row["log_probs"], dtype=torch.float32))
        if row["ids"] is not None:
            answer.ids = torch.tensor(row["ids"]).view(steps, -1)
            answer.top = torch.tensor(row["top"], dtype=torch.float32).view(steps, -1)
        if row["hidden"] is not None:
            kept = self.about["teachers"][self.name]["hidden"]
            answer.hidden = from_bytes(row["hidden"], getattr(torch, kept["dtype"]), kept["width"])
        return answer


def packed_head(head: Head) -> tuple[bytes, dict[str, Any]]:
    """Packs a plain head, to go with hidden states; also returns what else it takes to use it.

    Raises:
        ValueError: it is none that is a matrix alone.
    """
    if not head.is_linear:
        raise ValueError(f"hidden states need a plain head, not {type(head.module).__name__}; tell top_k instead")
    weight, bias = head.linear(None)
    tensors = {"weight": weight} | ({} if bias is None else {"bias": bias})
    if head.suppressed is not None:
        tensors["suppressed"] = head.suppressed
    dtype = str(weight.dtype).removeprefix("torch.")
    settings = {"scale": head.scale, "softcap": head.softcap, "width": weight.shape[1], "dtype": dtype}
    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}), settings


def read_head(packed: bytes, vocabulary: int, settings: dict[str, Any]) -> Head:
    """Unpacks a head."""
    tensors = load(packed)
    weight, bias = tensors["weight"], tensors.get("bias")
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    module.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    kept = {name: settings[name] for name in ("scale", "softcap")}
    return Head(module.requires_grad_(False), vocabulary, suppressed=tensors.get("suppressed"), **kept)
