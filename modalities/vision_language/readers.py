"""Readers of visual question answering data sets from local files, for ``python:`` sources."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SHAPES = {"circle", "rectangle", "triangle"}


def easy_vqa(folder: str, split: str = "train", count: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Reads easy-VQA (github.com/vzhou842/easy-VQA, MIT): one colored shape in 64 × 64 pixels, and questions about it.

    Args:
        folder: holds `easy_vqa.zip`, or what it unpacks to: `train/questions.json`, `train/images/0.png`, ….
        split: "train" (38,575 questions about 4000 images) or "test" (9673 about 1000).
        count: how many questions, drawn by `seed`; None: all, in their order.

    Returns rows of
        prompt: the question, as it is written ("what color is the shape?");
        image: a path, or the bytes of a file in the zip;
        answer: one of 13 words;
        category: "yes/no", "shape" or "color", the kind of answer.

    Raises:
        ValueError: there is no such split, it has fewer questions than asked for, or the files are not there.
    """
    if split not in ("train", "test"):
        raise ValueError(f"easy_vqa: split is {split!r}; it must be 'train' or 'test'")
    read, image = _files(Path(folder).expanduser())
    questions = json.loads(read(f"{split}/questions.json"))
    if count is not None:
        if count > len(questions):
            raise ValueError(f"easy_vqa: {count} rows asked for, {split} has {len(questions)}")
        questions = random.Random(seed).sample(questions, count)
    return [
        {
            "prompt": question,
            "image": image(f"{split}/images/{number}.png"),
            "answer": answer,
            "category": "yes/no" if answer in ("yes", "no") else "shape" if answer in _SHAPES else "color",
        }
        for question, answer, number in questions
    ]


def _files(folder: Path) -> tuple[Callable[[str], bytes], Callable[[str], Any]]:
    """Returns functions from a file's name to its bytes, and to an image as rows hold it."""
    if (folder / "train" / "questions.json").is_file():
        return lambda name: (folder / name).read_bytes(), lambda name: str(folder / name)
    if (folder / "easy_vqa.zip").is_file():
        files = zipfile.ZipFile(folder / "easy_vqa.zip")
        return files.read, lambda name: {"bytes": files.read(name), "path": name}
    raise ValueError(f"easy_vqa: {str(folder)!r} holds neither easy_vqa.zip nor train/questions.json")
