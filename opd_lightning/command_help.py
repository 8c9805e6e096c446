"""Help of a command, read from its file: to import that takes seconds, since the libraries come with it."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from importlib.util import resolve_name
from typing import Any

from .entry_points import file_of, summary

READ = {"help", "metavar", "default", "nargs", "action", "required", "const"}
"""What of `add_argument` stands in help; the rest decides how values are read."""

COMPUTED = {"add_mutually_exclusive_group", "add_subparsers"}
"""Calls that add arguments which do not stand in the file."""


class Unreadable(Exception):
    """Signal that something is computed, so that only the command itself can tell."""


def help_of(entry: EntryPoint) -> str | None:
    """Formats the help of a command: its constant HELP, or what its parser is given; None where that is computed."""
    file = file_of(entry.module)
    if file is None:
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    constants = _constants(tree)
    if "HELP" in constants:
        return str(constants["HELP"])
    # 1. the calls that fill its parser, in order
    bodies = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in (entry.attr, "parser")]
    calls = [node for body in bodies for node in ast.walk(body) if isinstance(node, ast.Call)]
    calls.sort(key=lambda call: call.lineno)
    names = {_name(call) for call in calls}
    if "add_argument" not in names or names & COMPUTED:
        return None
    # 2. the same parser, which only formats
    try:
        parsers = [_keywords(call, constants) for call in calls if _name(call) in ("Parser", "ArgumentParser")]
        epilog = next((keywords["epilog"] for keywords in parsers if "epilog" in keywords), None)
        parser = argparse.ArgumentParser(f"opd {entry.name}", description=_sentence(summary(entry)), epilog=epilog)
        for call in calls:
            if _name(call) == "add_argument":
                keywords = {name: value for name, value in _keywords(call, constants).items() if name in READ}
                parser.add_argument(*(_value(argument, constants) for argument in call.args), **_with_default(keywords))
            if _name(call) == "add_class_arguments":
                cls, prefix = call.args
                for flag, keywords in _fields(_imported(cls, tree, entry.module), f"--{_value(prefix, constants)}"):
                    parser.add_argument(flag, **_with_default(keywords))
    except (Unreadable, ValueError):  # a call of another form
        return None
    return parser.format_help()


def _imported(name: ast.expr, tree: ast.Module, module: str) -> tuple[ast.Module, str]:
    """Finds the file that a class is imported from, with the class's name in it."""
    for node in [node for node in tree.body if isinstance(node, ast.ImportFrom)]:
        for alias in node.names:
            if isinstance(name, ast.Name) and (alias.asname or alias.name) == name.id:
                origin = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
                if (file := file_of(origin)) is not None:
                    return ast.parse(file.read_text(encoding="utf-8")), alias.name
    raise Unreadable


def _fields(place: tuple[ast.Module, str], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads the fields of a dataclass, and of those that are fields of it: flags, and what stands in help."""
    tree, name = place
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if name not in classes or not any(getattr(d, "id", "") == "dataclass" for d in classes[name].decorator_list):
        raise Unreadable
    text, constants = ast.get_docstring(classes[name]) or "", _constants(tree)
    described = {
        m[1]: " ".join(m[2].split()) for m in re.finditer(r"^    (\w+): ((?:.+|\n {6,})+)", text, re.MULTILINE)
    }
    for node in classes[name].body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        flag, kind = f"{prefix}.{node.target.id}", ast.unparse(node.annotation)
        if kind in classes:
            yield from _fields((tree, kind), flag)
            continue
        keywords = {"help": described.get(node.target.id, ""), "metavar": kind}
        if isinstance(node.value, ast.Constant | ast.Name):
            keywords["default"] = _value(node.value, constants)
        yield flag, keywords | {"required": node.value is None}


def _with_default(keywords: dict[str, Any]) -> dict[str, Any]:
    """Says the default of an argument behind what it is, where that does not say it."""
    default, text = keywords.get("default"), keywords.get("help", "")
    if default in (None, {}) or "default" in text.lower() or "auto:" in text:
        return keywords
    return keywords | {"help": f"{text} (default: {str(default).lower() if isinstance(default, bool) else default})"}


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Reads names that a module gives plain values to."""
    values: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            try:
                value = _value(node.value, values)
            except Unreadable:
                continue
            target = node.targets[0]
            if isinstance(target, ast.Name):
                values[target.id] = value
            elif isinstance(target, ast.Tuple) and isinstance(value, tuple):
                values |= {name.id: v for name, v in zip(target.elts, value, strict=True) if isinstance(name, ast.Name)}
    return values


def _keywords(call: ast.Call, constants: dict[str, Any]) -> dict[str, Any]:
    """Evaluates what of a call's keywords stands in help."""
    wanted = {"epilog", *READ}
    return {k.arg: _value(k.value, constants) for k in call.keywords if k.arg in wanted}


def _value(node: ast.expr, constants: dict[str, Any]) -> Any:
    """Evaluates literals, names of constants, and texts with either in them.

    Raises:
        Unreadable: it is anything else.
    """
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.FormattedValue) else part for part in node.values]
        return "".join(str(_value(part, constants)) for part in parts)
    if isinstance(node, ast.Call) and _name(node) == "Path":
        return _value(node.args[0], constants)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        return str(_value(node.func.value, constants)).join(_value(node.args[0], constants))
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise Unreadable from None
