"""``--model.evaluation.help``: what stands behind a key, from the classes themselves."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse._parameter_resolvers import get_signature_parameters
from jsonargparse._util import import_object

from .config_file import ConfigError, Source, did_you_mean, dotted
from .config_keys import accepted, base_of, find_class, is_abstract, is_closed, is_list, kinds_of, members, name_of


def print_help(sources: Sequence[Source], kinds: Mapping[str, Any], together: Mapping[str, Any]) -> None:
    """Prints what an argument asks, and exits; nothing where none asks.

    Args:
        kinds: what may stand at the top of a configuration.
        together: all that files and arguments say: of a key whose class they name, that class is explained.

    Raises:
        ConfigError: there is no such key or class.
    """
    asked = next((source for source in sources if source.name.endswith(".help")), None)
    if asked is None:
        return
    flag, _, inline = asked.tokens[0].partition("=")
    keys = flag.removeprefix("--").split(".")[:-1]
    sys.stdout.write(_page(keys, inline or (*asked.tokens, "")[1], kinds, together))
    sys.exit(0)


def _page(keys: list[str], named: str, kinds: Mapping[str, Any], values: Any) -> str:
    kind: Any = None
    for place, key in enumerate(keys):
        below: Mapping[Any, Any] = kinds if place == 0 else _inside(kind, values)
        if key in ("init_args", "class_path"):
            continue
        if key not in below and None not in below:
            known = ", ".join(below) or "none"
            raise ConfigError(
                f"{dotted(keys[: place + 1])}: no such key{did_you_mean(key, below)}\n  there are {known}"
            )
        kind = below[key] if key in below else below[None]
        values = values.get("init_args", values).get(key) if isinstance(values, Mapping) else None
    return _explained(keys, kind, named, values)


def _inside(kind: Any, values: Any) -> Mapping[Any, Any]:
    """The keys below a key with their types; under None the type of any name's."""
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
    """The class that explains a key: the one that the configuration names there, or the one that all are kinds of."""
    if is_closed(kind):
        return getattr(kind, "cls", kind)
    base = base_of(kind)
    named = values.get("class_path") if isinstance(values, Mapping) else values
    return find_class(named, base) if base is not None and isinstance(named, str) else base


def _explained(keys: list[str], kind: Any, named: str, values: Any) -> str:
    for member in members(kind):
        if is_list(member) or typing.get_origin(member) is dict:
            return _explained(keys, typing.get_args(member)[-1], named, None)
        cls = _class_of(member, named or values)
        if cls is not None:
            base = base_of(member)
            choices = kinds_of(base) if base is not None else []
            text = "" if is_abstract(cls) and choices else _arguments(keys, cls)
            more = _list_of(keys, base, choices) if base is not None and not named else ""
            return f"{text}{more}".lstrip("\n")
    return f"{dotted(keys)}: {name_of(kind)}\n"


def _arguments(keys: list[str], cls: Any) -> str:
    lines = [f"{dotted(keys)}: {cls.__name__}", *(f"  {line}" for line in _summary(cls).splitlines()), ""]
    for parameter in get_signature_parameters(cls, "__init__" if inspect.isclass(cls) else None):
        kind, default = parameter.annotation, parameter.default
        line = parameter.name if kind is inspect.Parameter.empty else f"{parameter.name}: {name_of(kind)}"
        lines.append(f"  {line}" if default is inspect.Parameter.empty else f"  {line} = {_default(default)}")
        lines += [f"      {line.strip()}" for line in (parameter.doc or "").splitlines()]
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    return value.__name__ if inspect.isfunction(value) else repr(value)


def _summary(cls: Any) -> str:
    return (inspect.getdoc(cls) or "").partition("\n\n")[0]


def _list_of(keys: list[str], base: type, choices: list[str]) -> str:
    lines = [f"\nkinds of {base.__name__} (--{dotted(keys)}.help NAME says more):"]
    for choice in choices:
        summary = _summary(import_object(choice)).partition("\n")[0]
        lines.append(f"  {choice.rpartition('.')[2]:<22} {summary}")
    return "\n".join(lines) + "\n"
