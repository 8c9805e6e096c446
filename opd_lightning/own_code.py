"""Own code: functions and classes that a configuration names by their import path, as they are when a run begins."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sys
import sysconfig
import textwrap
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from .changes import leaves, short

DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
INSTALLED = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
OURS = __name__.partition(".")[0]


def fingerprints(config_yaml: str) -> dict[str, str]:
    """Computes a fingerprint of each function or class that a configuration names, by its key.

    Of other objects, that of their class. Only of code that was imported, and that no installed package holds: what
    people edit between two runs. Comments, docstrings and layout don't count; what a function calls is not looked at.
    """
    marks: dict[str, str] = {}
    for key, value in leaves(yaml.safe_load(config_yaml) or {}).items():
        if isinstance(value, str) and DOTTED.fullmatch(value) and (mark := _fingerprint(value)) is not None:
            marks[key.removesuffix(".class_path")] = mark
    return marks


def edited(then: Mapping[str, str], now: Mapping[str, str]) -> list[list[str]]:
    """Lists ``[key, old, new]`` for each piece of code, known in both, that is another one."""
    return [
        [short(key), f"code {then[key]}", f"code {mark}"] for key, mark in now.items() if then.get(key, mark) != mark
    ]


def _fingerprint(path: str) -> str | None:
    """Returns a hash of what is at an import path; None where nobody edits it, or its text is not known."""
    module_name, _, name = path.rpartition(".")
    module = sys.modules.get(module_name)
    thing: Any = getattr(module, name, None)
    while isinstance(thing, partial):
        thing = thing.func
    if not (inspect.isfunction(thing) or inspect.isclass(thing)):
        thing = type(thing)
    try:
        file = Path(inspect.getsourcefile(thing) or "").resolve()
        if thing.__module__.split(".")[0] == OURS or any(file.is_relative_to(folder) for folder in INSTALLED):
            return None
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:8]
