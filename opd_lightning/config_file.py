"""Configuration files and arguments, read strictly: much that YAML accepts in silence is refused.

Imports nothing heavy, so that errors in a configuration are reported before the libraries are loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .jsonargparse_internals import get_yaml_default_loader, yaml_load

Keys = tuple[str | int, ...]

MOST_VALUES = 100_000
"""Limit of values in a configuration: aliases of aliases unfold exponentially."""
NO_NUMBERS = ("nan", "inf", "infinity")


class ConfigError(ValueError):
    """Error in a configuration. The message is for whoever wrote it, and names key, file and line."""


class Text(str):
    """Value as it was typed on the command line; its key decides whether it is text, a number or a list."""


class Whole(dict[str, Any]):
    """Mapping by name that replaces an earlier one as a whole: names that it lacks were removed."""


SECRETIVE = ("key", "token", "url")
"""Last keys of settings whose values no message repeats."""


@dataclass
class Source:
    """Source of settings: one file, or one argument of the command line.

    Attributes:
        name: its path, or the argument.
        values: its settings.
        lines: of a file, the line of each key.
        keys: of an argument, the keys that it sets; empty for a request such as ``--print_config``.
        tokens: its words on the command line.
    """

    name: str
    values: dict[str, Any]
    lines: dict[Keys, int] = field(default_factory=dict)
    keys: Keys = ()
    tokens: tuple[str, ...] = ()

    def place(self, keys: Keys) -> str | None:
        """Returns the place where it sets a key, for messages; None: it does not."""
        if self.keys:
            asked, set_here = ([key for key in which if key != "init_args"] for which in (keys, self.keys))
            # a value that is refused there may be the secret itself, in place of where it is
            name = self.name.partition("=")[0] if self.keys[-1] in SECRETIVE else self.name
            return f"what the command line says: {name}" if asked[: len(set_here)] == set_here else None
        return f"{self.name}, line {self.lines[keys]}" if keys in self.lines else None


def dotted(keys: Sequence[str | int]) -> str:
    """Joins keys: ``model.init_args.objective.terms[0].signal``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Asks for the nearest name, at the end of a message; empty if none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def read(path: str) -> Source:
    """Reads a configuration file.

    Raises:
        ConfigError: it can't be read, is no YAML, has a key twice, holds itself, a value that is no number or nothing.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}, line {line}: this is not UTF-8 ({error.reason}); save it in that encoding"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    loader = get_yaml_default_loader()(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: a configuration is keys and values, and this holds {_kind(node)}")
        lines = _Walk(path).lines_of(node)
        return Source(path, loader.construct_document(node), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else path
        raise ConfigError(f"{where}: this is no YAML: {error.problem or error}{_advice(text, mark)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: this is no YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: its values are nested too deeply") from None
    finally:
        loader.dispose()


def _kind(node: yaml.Node | None) -> str:
    if node is None:
        return "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else f"one value: {node.value[:40]!r}"


def _advice(text: str, mark: yaml.Mark | None) -> str:
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    return "; a value that begins with {{ must be quoted" if ": {{" in line else ""


class _Walk:
    """Walk through the nodes of a file: only nodes, not values, have lines, duplicate keys, and aliases."""

    def __init__(self, path: str) -> None:
        self.path, self.lines = path, dict[Keys, int]()
        self.count, self.above = 0, set[int]()

    def lines_of(self, node: yaml.Node) -> dict[Keys, int]:
        self._visit(node, ())
        return self.lines

    def _fail(self, node: yaml.Node, what: str) -> NoReturn:
        raise ConfigError(f"{self.path}, line {node.start_mark.line + 1}: {what}")

    def _visit(self, node: yaml.Node, keys: Keys) -> None:
        self.count += 1
        if self.count > MOST_VALUES:
            self._fail(node, f"its aliases unfold into more than {MOST_VALUES:,} values")
        if id(node) in self.above:
            self._fail(node, f"{dotted(keys)} is an alias of what holds it")
        self.above.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self._mapping(node, keys)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.lines.setdefault((*keys, index), item.start_mark.line + 1)
                self._visit(item, (*keys, index))
        elif node.tag.endswith(":float") and not _finite(node.value):
            self._fail(node, f"{dotted(keys)} is {node.value}, which is no number that a setting can have")
        self.above.remove(id(node))

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> None:
        first_lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self._fail(
                    key, f"{dotted(keys)} has a key that is no text; a value that begins with {{{{ must be quoted"
                )
            if key.tag.endswith(":merge"):
                self._visit(value, keys)
                continue
            if key.value in first_lines:
                self._fail(key, f"{dotted((*keys, key.value))} is there twice, first in line {first_lines[key.value]}")
            first_lines[key.value] = line
            self.lines[(*keys, key.value)] = line
            self._visit(value, (*keys, key.value))


def _finite(text: str) -> bool:
    try:
        return math.isfinite(float(text.replace("_", "").lower().replace(".nan", "nan").replace(".inf", "inf")))
    except ValueError:  # 1:30.5 is YAML's ninety seconds and a half
        return True


def is_no_number(value: Any) -> bool:
    """Tells whether a value is NaN or infinite, as a float or as a word that a float may be read from."""
    if isinstance(value, str):
        return value.strip().lower().lstrip("+-.") in NO_NUMBERS
    return isinstance(value, float) and not math.isfinite(value)


def load(text: str) -> Any:
    """Reads a value of the command line, or a whole configuration as JSON.

    YAML would read null from ``# {{ prompt }}``, a comment, and from ``&a``: such a value is the text itself.
    """
    if text.lstrip().startswith(("{", "[")):
        try:
            return json.loads(text)
        except ValueError:
            pass
    try:
        value = yaml_load(text)
    except yaml.YAMLError:
        return text
    return text if value is None and text.strip() not in ("", "null", "~") else value


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes texts which `load` would take for numbers, such as 1e3, a text in YAML 1.1."""


_Dumper.yaml_implicit_resolvers = get_yaml_default_loader().yaml_implicit_resolvers


def dump(values: Any) -> str:
    """Writes a configuration as YAML, such that `read` returns it."""
    return yaml.dump(values, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def said(arguments: Sequence[str]) -> list[Source]:
    """Reads files and arguments as sources, in their order.

    Raises:
        ConfigError: a file can't be read, or something is neither file nor argument.
    """
    sources, rest = [], list(arguments)
    while rest:
        first = rest.pop(0)
        name, equals, value = first.partition("=")
        if not name.startswith("-"):
            raise ConfigError(f"{first}: what is this? Files are given as `-c FILE`, values as `--key=value`")
        tokens: tuple[str, ...] = (first,)
        if not equals and rest and not rest[0].startswith("--") and name != "--traceback":
            value = rest.pop(0)
            tokens = (first, value)
        if name in ("-c", "--config"):
            sources.append(dataclasses.replace(read(value), tokens=tokens))
        else:
            sources.append(_argument(name, value, tokens))
    return sources


def _argument(name: str, value: str, tokens: tuple[str, ...]) -> Source:
    """Reads an argument ``--a.b=value`` as a source."""
    keys = tuple(name.removeprefix("--").split("."))
    if keys[-1] == "help" or keys[0] in ("print_config", "traceback"):
        return Source(name, {}, tokens=tokens)
    values: Any = Text(value)
    for key in reversed(keys):
        values = {key: values}
    return Source(" ".join(tokens), values, keys=keys, tokens=tokens)


def leaves(values: Any) -> Iterator[Any]:
    """Yields the values that are neither mappings nor lists."""
    inner = values.values() if isinstance(values, dict) else values if isinstance(values, list) else None
    yield from [values] if inner is None else (leaf for value in inner for leaf in leaves(value))


def overlaid(before: Any, values: Any) -> Any:
    """Lays settings over others: they are replaced key by key; another class drops the earlier arguments."""
    if isinstance(before, str) and (_arguments_alone(values) or (_names_a_class(before) and _is_open(values))):
        return {"class_path": before, **values}
    if isinstance(values, str) and _arguments_alone(before):
        return {"class_path": values, **before}
    if not isinstance(before, dict) or not isinstance(values, dict) or isinstance(values, Whole):
        return values
    if "class_path" in values and _short(values) != _short(before):
        return values
    return {**before, **{key: overlaid(before.get(key), value) for key, value in values.items()}}


def _names_a_class(text: str) -> bool:
    return text.rpartition(".")[2][:1].isupper() and all(word.isidentifier() for word in text.split("."))


def _is_open(values: Any) -> bool:
    """Tells whether values may be arguments without ``init_args``, as the command line allows."""
    return isinstance(values, dict) and bool(values) and "class_path" not in values


def _arguments_alone(values: Any) -> bool:
    """Tells whether values are arguments of a class that is named elsewhere."""
    return isinstance(values, dict) and bool(values) and values.keys() <= {"init_args", "dict_kwargs"}


def _short(values: dict[str, Any]) -> str:
    return str(values.get("class_path", "")).rpartition(".")[2]
