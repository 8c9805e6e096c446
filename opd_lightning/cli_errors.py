"""Configuration errors for people: which key, what is wrong with it, what would be right, and which file holds it."""

from __future__ import annotations

import inspect
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, NoReturn

from jsonargparse import ArgumentError
from jsonargparse._util import import_object
from lightning.pytorch.cli import LightningArgumentParser

# What jsonargparse says about how it looked, not about what is wrong
_NOISE = re.compile(r"^(- )?(Does not validate|Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value)")
_KEY = re.compile(r'^(?:- )?Parser key "([^"]+)":')
_CLASS = re.compile(r"^(?:- )?Problem with given class_path '([^']+)'")
_QUOTED = re.compile(r"'([\w.]+)'")


class Parser(LightningArgumentParser):
    """Prints the innermost problem in place of jsonargparse's account of everything that it tried."""

    files: ClassVar[list[Path]] = []

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        sys.stderr.write(explain(message, self.files))
        sys.exit(2)


def explain(message: str, files: list[Path]) -> str:
    """The short form of an error message of jsonargparse, with the file and line that hold the key."""
    path: list[str] = []
    class_path = ""
    problems: list[str] = []
    for line in message.splitlines():
        text = line.strip()
        if found := _KEY.match(text):
            if not problems:
                path += found.group(1).split(".")
            text = text[found.end() :].strip()
        elif found := _CLASS.match(text):
            class_path = class_path if problems else found.group(1)
            continue
        if text and not _NOISE.match(text):
            problems.append(text.removeprefix("- "))
    if not problems:
        return f"error: {message}\n"
    named = [name for name in _QUOTED.findall(problems[0]) if not name.startswith(("int", "float", "str"))]
    keys = [named[-1].rpartition(".")[2]] if "accept" in problems[0] and named else path[-1:]
    lines = [f"error: {'.'.join(path)}: {problems[0]}" if path else f"error: {problems[0]}"]
    if "not accepted" in problems[0] and class_path:
        lines.append(f"  {class_path.rpartition('.')[2]} accepts {', '.join(_options(class_path))}")
    lines += [f"  in {where}" for key in keys for where in _mentions(key, files)[-1:]]  # the last file wins
    return "\n".join([*lines, *(f"  {problem}" for problem in problems[1:4])]) + "\n"


def config_files(arguments: list[str]) -> list[Path]:
    """The files given by ``-c``, ``--config``."""
    values = [b for a, b in pairwise(arguments) if a in ("-c", "--config")]
    values += [a.partition("=")[2] for a in arguments if a.startswith(("-c=", "--config="))]
    return [path for path in map(Path, values) if path.is_file()]


def _mentions(key: str, files: list[Path]) -> list[str]:
    pattern = re.compile(rf"(^|[\s{{,]){re.escape(key)}\+?\s*:")
    return [
        f"{path}, line {number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


def _options(class_path: str) -> list[str]:
    parameters = inspect.signature(import_object(class_path)).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
