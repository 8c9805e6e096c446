"""``--model.evaluation.help``: the arguments below a key, from the classes themselves."""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import docstring_parser

from .config_file import ConfigError, Source, dotted
from .config_keys import (
    accepted,
    base_of,
    find_class,
    is_abstract,
    is_closed,
    is_list,
    is_part,
    kinds_of,
    meant,
    members,
    name_of,
)
from .entry_points import packages
from .jsonargparse_internals import get_signature_parameters, import_object


def print_help(
    sources: Sequence[Source], kinds: Mapping[str, Any], together: Mapping[str, Any], said: Mapping[str, str]
) -> None:
    """Prints the help that an argument asks for, and exits; returns if none does.

    Args:
        kinds: types of the keys at the top of a configuration.
        together: settings of all files and arguments: of a key whose class they name, that class is explained.
        said: descriptions of the keys at the top.

    Raises:
        ConfigError: there is no such key or class.
    """
    asked = next((source for source in sources if source.name.endswith(".help")), None)
    if asked is None:
        return
    flag, _, inline = asked.tokens[0].partition("=")
    keys = flag.removeprefix("--").split(".")[:-1]
    sys.stdout.write(_page(keys, inline or (*asked.tokens, "")[1], kinds, together, said))
    sys.exit(0)


def _page(keys: list[str], named: str, kinds: Mapping[str, Any], values: Any, said: Mapping[str, str]) -> str:
    kind: Any = None
    text = said.get(keys[0], "")
    for depth, key in enumerate(keys):
        below: Mapping[Any, Any] = kinds if depth == 0 else _inside(kind, values)
        if key in ("init_args", "class_path"):
            continue
        if key not in below and None not in below:
            _refuse(keys[: depth + 1], below, kind)
        text = documented(_holder(kind, values), key) if depth else text
        kind = below[key] if key in below else below[None]
        values = values.get("init_args", values).get(key) if isinstance(values, Mapping) else None
    return _explained(keys, kind, named, values, text)


def _refuse(keys: list[str], below: Mapping[Any, Any], kind: Any) -> NoReturn:
    """Refuses a key, naming the classes that have it, if any.

    Raises:
        ConfigError: always.
    """
    key, holder = keys[-1], dotted(keys[:-1])
    bases = [base for member in members(kind) if (base := base_of(member)) is not None]
    names = [n for base in bases for n, path in kinds_of(base).items() if key in accepted(import_object(path))]
    if names:
        raise ConfigError(
            f"{dotted(keys)}: whether there is one depends on the class of {holder}: it is a key of "
            f"{', '.join(names)}. Give the configuration that names the class (-c FILE), or ask for "
            f"--{holder}.help {names[0]}"
        )
    there = f"there are {', '.join(map(str, below))}" if below else f"{holder or 'it'} has no keys"
    raise ConfigError(f"{dotted(keys)}: no such key{meant(key, below)}\n  {there}")


def _holder(kind: Any, values: Any) -> Any:
    """Finds the class whose arguments are the keys below a key; None: they are names."""
    for member in members(kind):
        if is_list(member):
            return _holder((*typing.get_args(member), Any)[0], None)
        if (cls := _class_of(member, values)) is not None:
            return cls
    return None


def documented(cls: Any, key: str) -> str:
    """Finds the description of an argument in the docstring of a class, also where it is one of several at once."""
    if cls is None:
        return ""
    for parameter in get_signature_parameters(cls, "__init__" if inspect.isclass(cls) else None):
        if parameter.name == key and parameter.doc:
            return str(parameter.doc)
    for source in getattr(cls, "__mro__", (cls,)):
        for entry in docstring_parser.parse(inspect.getdoc(source) or "").params:
            if key in re.split(r",\s*", entry.arg_name):
                return entry.description or ""
    return ""


def _inside(kind: Any, values: Any) -> Mapping[Any, Any]:
    """Lists the keys below a key with their types; None as key: any name."""
    for member in members(kind):
        arguments = typing.get_args(member)
        if is_list(member):
            return _inside((*arguments, Any)[0], None)
        if typing.get_origin(member) is dict and len(arguments) == 2:
            return {None: arguments[1]}
        if (cls := _class_of(member, values)) is not None:
            return accepted(cls)
    return {}


def _class_of(kind: Any, values: Any) -> Any:
    """Finds the class that explains a key: the one that the configuration names there, or the base of all."""
    if is_closed(kind):
        return getattr(kind, "cls", kind)
    base = base_of(kind)
    named = values.get("class_path") if isinstance(values, Mapping) else values
    return find_class(named, base) if base is not None and isinstance(named, str) else base


def _explained(keys: list[str], kind: Any, named: str, values: Any, said: str = "") -> str:
    """Formats the help of a key.

    Args:
        said: description of a key that no class explains.
    """
    for member in members(kind):
        if is_list(member) or typing.get_origin(member) is dict:
            if not is_part((*typing.get_args(member), Any)[-1]):
                continue
            return _explained(keys, typing.get_args(member)[-1], named, None)
        cls = _class_of(member, named or values)
        if cls is not None:
            base = base_of(member)
            choices = kinds_of(base) if base is not None else {}
            text = "" if is_abstract(cls) and choices else _arguments(keys, cls)
            more = _list_of(keys, base, choices) if base is not None and not named else ""
            return f"{text}{more}".lstrip("\n")
    return "\n".join([f"{dotted(keys)}: {name_of(kind)}", *_indented(said, "  ")]) + "\n"


def _indented(text: str, margin: str) -> list[str]:
    return [f"{margin}{line.strip()}" for line in text.splitlines()]


def _arguments(keys: list[str], cls: Any) -> str:
    lines = [f"{dotted(keys)}: {cls.__name__}", *(f"  {line}" for line in summary_of(cls).splitlines()), ""]
    for parameter in get_signature_parameters(cls, "__init__" if inspect.isclass(cls) else None):
        kind, default = parameter.annotation, parameter.default
        line = parameter.name if kind is inspect.Parameter.empty else f"{parameter.name}: {name_of(kind)}"
        lines.append(f"  {line}" if default is inspect.Parameter.empty else f"  {line} = {shown(default)}")
        lines += _indented(documented(cls, parameter.name), "      ")
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    return value.__name__ if inspect.isfunction(value) else repr(value)


def summary_of(cls: Any) -> str:
    return (inspect.getdoc(cls) or "").partition("\n\n")[0]


def _list_of(keys: list[str], base: type, choices: Mapping[str, str]) -> str:
    """Formats a line for each class of a kind; packages that register parts come before libraries."""
    ours = packages()
    lines = [f"\nkinds of {base.__name__} (--{dotted(keys)}.help NAME says more):"]
    for name, path in sorted(choices.items(), key=lambda choice: (choice[1].partition(".")[0] not in ours, *choice)):
        summary = summary_of(import_object(path)).partition("\n")[0]
        lines.append(f"  {name:<22} {summary}")
    return "\n".join(lines) + "\n"
