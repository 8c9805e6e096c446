"""Keys of a configuration, checked at every depth against the classes that it names."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import types
import typing
from collections import Counter, abc
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, Union

import torch

from .catalog import bases_of
from .config_file import ConfigError, Keys, Source, Text, Whole, did_you_mean, dotted, is_no_number, load, overlaid
from .jsonargparse_internals import get_all_subclass_paths, get_signature_parameters, import_object, type_to_str
from .plain_values import refusal

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
LISTS = (list, tuple, set, abc.Sequence, abc.Iterable, abc.Collection, abc.MutableSequence)
RENAMED = {"policy": "rule", "answers": "velocity_targets", "answer": "answer_format"}
"""Keys of 0.1 before its words were settled, where the new one is spelled too differently to be guessed."""
PLAIN = (str, int, float, bool, bytes, complex, object, type(None), Any)


@dataclasses.dataclass(frozen=True)
class Exactly:
    """Type of one class whose arguments are given without ``class_path``, as the trainer's are."""

    cls: type


@cache
def accepted(cls: Any) -> dict[str, Any]:
    """Lists the arguments of a class or function with their types, also those that it passes on as ``**kwargs``."""
    parameters = get_signature_parameters(cls, "__init__" if inspect.isclass(cls) else None)
    return {parameter.name: _kind(parameter) for parameter in parameters}


def _kind(parameter: Any) -> Any:
    if parameter.annotation is inspect.Parameter.empty:
        return Any
    return parameter.annotation | None if parameter.default is None else parameter.annotation


def members(kind: Any) -> list[Any]:
    """Lists the types of a union, with those of unions inside it."""
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) in (Union, types.UnionType):
        return [member for inner in typing.get_args(kind) for member in members(inner)]
    return [kind]


def is_closed(kind: Any) -> bool:
    """Tells whether the arguments of a type are given without ``class_path``."""
    return isinstance(kind, Exactly) or (inspect.isclass(kind) and dataclasses.is_dataclass(kind))


def base_of(kind: Any) -> type | None:
    """Returns the base class of a type that takes ``class_path``; None for other types."""
    if kind is torch.Tensor:  # beside float, as optimizers take it; nobody writes one into a configuration
        return None
    if inspect.isclass(kind) and kind not in PLAIN and not is_closed(kind) and typing.get_origin(kind) is None:
        return None if issubclass(kind, (str, int, float, bytes, dict, *LISTS[:3], Path)) or kind in LISTS else kind
    if typing.get_origin(kind) is abc.Callable and len(typing.get_args(kind)) == 2:
        result = typing.get_args(kind)[1]
        return base_of(members(result)[0])
    return None


def is_part(kind: Any) -> bool:
    """Tells whether a value of a type is built from arguments of a class."""
    return any(is_closed(member) or base_of(member) is not None for member in members(kind))


def meant(name: str, known: Mapping[str, Any]) -> str:
    """Asks whether a key of its nearest spelling was meant, or says what the key is called now."""
    new = RENAMED.get(name, "")
    return f"; it is called {new} now" if new in known else did_you_mean(name, known)


class Checker:
    """Check of the values of a source against the types that take them."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.arguments = bool(source.keys)  # on the command line ``init_args`` may be left out

    def fail(self, keys: Keys, what: str) -> NoReturn:
        raise ConfigError(f"{dotted(keys)}: {what}\n  in {self.source.place(keys) or self.source.name}")

    def settings(self, values: Mapping[str, Any], kinds: Mapping[str, Any], keys: Keys, who: str, before: Any) -> Any:
        """Checks values by key.

        Args:
            values: of the source.
            kinds: types by key.
            keys: of the mapping that holds them.
            who: the class that takes them, for messages.
            before: values of earlier sources at these keys.

        Raises:
            ConfigError: the class has no such key; the message names the class and all that it accepts.
        """
        checked = {}
        for key, value in values.items():
            name = str(key).removesuffix("+")
            if name not in kinds:
                self.fail((*keys, key), f"{who} has no {name!r}{meant(name, kinds)}{self._accepts(who, kinds)}")
            if name != key and isinstance(value, dict) and not is_list(kinds[name]):
                self.fail((*keys, key), f"only lists are appended to with +; write {name}: (it is merged by name)")
            earlier = before.get(name) if isinstance(before, dict) else None
            if name == key and isinstance(before, dict) and f"{name}+" in before:
                added = before[f"{name}+"]
                earlier = added if isinstance(added, list) else [added]
            checked[key] = self.value(value, kinds[name], (*keys, key), earlier)
        return checked

    def _accepts(self, who: str, kinds: Mapping[str, Any]) -> str:
        return f"\n  {who} accepts {', '.join(kinds)}" if kinds else f"\n  {who} accepts nothing"

    def value(self, value: Any, kind: Any, keys: Keys, before: Any = None) -> Any:
        """Checks a value against its type; mappings of parts are merged by name into earlier ones."""
        kinds = members(kind)
        # 1. the command line: texts are read, and keys of a list are those of its last entry
        if isinstance(value, Text):
            value = self._typed(value, kinds, keys, before)
        if self.arguments and isinstance(value, Mapping) and is_list(kind) and not isinstance(before, Mapping | str):
            return self._of_last(value, kinds, keys, before)
        # 2. null and NaN
        if value is None:
            if not {type(None), Any, object} & set(kinds):
                self.fail(keys, f"null where {' or '.join(map(name_of, kinds))} belongs")
            return value
        if is_no_number(value) and float in kinds and (str not in kinds or isinstance(value, float)):
            self.fail(keys, f"{value} is no number that a setting can have")
        # 3. mappings, parts and lists: the first member of a union that takes the value
        problem = None
        for member in kinds:
            try:
                if isinstance(value, Mapping) and is_closed(member):
                    return self._closed(value, member, keys, before)
                if isinstance(value, Mapping) and typing.get_origin(member) in (dict, abc.Mapping):
                    return self._mapping(value, typing.get_args(member)[1], keys, before)
                if isinstance(value, Mapping | str) and (base := base_of(member)) is not None:
                    return self._part(value, base, member, keys, before)
                if isinstance(value, list) and is_list(member):
                    item = (*typing.get_args(member), Any)[0]
                    return [self.value(v, item, (*keys, index)) for index, v in enumerate(value)]
            except ConfigError as error:
                if str in kinds and isinstance(value, str):
                    return value
                problem = problem or error
        if problem is not None:
            raise problem
        # 4. plain values
        self._shape(value, kinds, keys)
        if (what := refusal(value, kinds)) is not None:
            self.fail(keys, what)
        return value

    def _of_last(self, value: Mapping[str, Any], kinds: list[Any], keys: Keys, before: Any) -> Any:
        """Checks a key of a list on the command line, `--trainer.callbacks.patience`: it is one of its last entry."""
        if isinstance(before, list) and before:
            items = [item for kind in kinds if is_list(kind) for item in typing.get_args(kind)[:1] if is_part(item)]
            if items:
                self.value(value, items[0], keys, before[-1])
        return value

    def _typed(self, text: Text, kinds: list[Any], keys: Keys, before: Any) -> Any:
        """Reads a value of the command line: as text where text is taken, unless it fits another type."""
        plain = str(text)
        value = load(plain)
        value = Whole(value) if isinstance(value, Mapping) else value
        words = [word for kind in kinds if typing.get_origin(kind) is typing.Literal for word in typing.get_args(kind)]
        if plain in words or not (str in kinds or Path in kinds):
            return plain if plain in words else value
        if isinstance(value, Mapping | list):
            keyed = [kind for kind in kinds if is_part(kind) or typing.get_origin(kind) is dict]
            structured = keyed if isinstance(value, Mapping) else [kind for kind in kinds if is_list(kind)]
            try:
                return self.value(value, Union[tuple(structured)], keys, before) if structured else plain  # noqa: UP007
            except ConfigError:
                return plain
        meant = {"null": type(None), "true": bool, "false": bool}.get(plain, type(value))
        numbers = meant is int and float in kinds
        return value if meant is not str and plain not in ("on", "yes") and (meant in kinds or numbers) else plain

    def _shape(self, value: Any, kinds: list[Any], keys: Keys) -> None:
        """Refuses values where only mappings or only lists fit."""
        not_null = [member for member in kinds if member is not type(None)]
        if isinstance(value, Mapping) and not_null and all(is_list(member) for member in not_null):
            self.fail(keys, f"keys where a list belongs, each of whose entries begins with '- ': {', '.join(value)}")
        if not_null and all(is_list(member) for member in not_null) and not str(value).startswith("["):
            self.fail(keys, f"{value!r} where a list belongs")
        if not not_null or not all(is_closed(m) or base_of(m) or typing.get_origin(m) is dict for m in not_null):
            return
        if (isinstance(value, str) and Path(value).is_file()) or (isinstance(value, Mapping) and self.arguments):
            return
        wanted = " or ".join(map(name_of, not_null))
        kind = next((m for m in not_null if is_closed(m)), None)
        more = self._accepts(wanted, accepted(getattr(kind, "cls", kind))) if kind else ""
        what = "a list" if isinstance(value, list) else repr(value)
        self.fail(keys, f"{what} where the keys of {wanted} belong{more}")

    def _closed(self, value: Mapping[str, Any], kind: Any, keys: Keys, before: Any) -> Any:
        cls = getattr(kind, "cls", kind)
        if str(value.get("class_path", "")).rpartition(".")[2] == cls.__name__:
            value = value.get("init_args", {})
        return self.settings(value, accepted(cls), keys, cls.__name__, before)

    def _mapping(self, value: Mapping[str, Any], kind: Any, keys: Keys, before: Any) -> Any:
        if not is_part(kind):
            earlier = (
                before if self.arguments and not isinstance(value, Whole) else None
            )  # one key of --data.…options.count
            return Whole({**(earlier or {}), **{name: self.value(v, kind, (*keys, name)) for name, v in value.items()}})
        merged = Whole(before or {})
        for name, entry in value.items():
            if entry is not None and entry != Text("null"):
                merged[name] = self.value(overlaid(merged.get(name), entry), kind, (*keys, name), merged.get(name))
            elif merged.pop(name, None) is None:
                self.fail((*keys, name), f"null removes nothing, there are {sorted(before or {})}")
        return merged

    def _part(self, value: Mapping[str, Any] | str, base: type, kind: Any, keys: Keys, before: Any) -> Any:
        # 1. a class alone, a file that holds the part, or a function that a class of its kind calls
        if isinstance(value, str):
            if Path(value).is_file():
                return value
            if (calling := called(value, base)) is not None:
                return calling
            self._class(value, base, keys)
            return value
        # 2. its class: named here, earlier, or the only one
        if self.arguments:
            extra = {key: v for key, v in value.items() if key not in CLASS_KEYS}
            value = {k: v for k, v in value.items() if k in CLASS_KEYS}
            value = {**value, "init_args": {**value.get("init_args", {}), **extra}} if extra else value
        earlier = before if isinstance(before, Mapping) else {"class_path": before}
        path = value.get("class_path") or earlier.get("class_path")
        stray = [key for key in value if key not in CLASS_KEYS]
        if len(stray) == len(value) > 0 and not path and not is_abstract(base) and accepted(base):
            return self.settings(value, accepted(base), keys, base.__name__, None)
        if stray:
            cls = self._class(path, base, keys) if path else base
            hint = f"; {stray[0]} belongs into {dotted(keys)}.init_args" if stray[0] in accepted(cls) else ""
            if not path and (taking := [name for name, cls in kinds_of(base).items() if self._takes(cls, stray)]):
                self.fail(
                    keys, f"add class_path: {' or '.join(taking)}, and put {' and '.join(stray)} under its init_args"
                )
            near = hint or did_you_mean(stray[0], CLASS_KEYS)
            self.fail((*keys, stray[0]), f"what is a {base.__name__} takes class_path and init_args{near}")
        if not path:
            if below := bases_of(self.source.name):
                self.fail(keys, f"this file is an overlay; put what it is laid over before it: {' or '.join(below)}")
            self.fail(keys, f"it names no class: add class_path{choices(base)}")
        cls = self._class(path, base, (*keys, "class_path") if "class_path" in value else keys)
        # 3. its arguments
        inside = value.get("init_args", {})
        if inside is None or isinstance(inside, str | list | int | float):
            self.fail((*keys, "init_args"), f"{inside!r} where the arguments of {cls.__name__} belong")
        if cls.__name__ != str(earlier.get("class_path")).rpartition(".")[2]:
            earlier = {}
        kinds = accepted(cls)
        if typing.get_origin(kind) is abc.Callable:
            given = typing.get_args(kind)[0]
            kinds = dict(list(kinds.items())[len(given) if isinstance(given, list) else 0 :])
        if value.get("dict_kwargs"):
            return value
        inside = self.settings(inside, kinds, (*keys, "init_args"), cls.__name__, earlier.get("init_args"))
        return {**value, "init_args": inside} if "init_args" in value else dict(value)

    def _takes(self, path: str, names: list[Any]) -> bool:
        return set(names) <= accepted(import_object(path)).keys()

    def _class(self, path: Any, base: type, keys: Keys) -> Any:
        try:
            return find_class(path, base)
        except ConfigError as error:
            self.fail(keys, str(error))


def find_class(path: Any, base: type) -> Any:
    """Finds the class or function of a name, short or dotted.

    Raises:
        ConfigError: there is none, or it is of another kind.
    """
    # 1. the whole name
    if not isinstance(path, str):
        raise ConfigError(f"{path!r} where the name of a {base.__name__} belongs{choices(base)}")
    if "." not in path:
        named = [name for name in get_all_subclass_paths(base) if _short(name) == path]
        if not named:
            near = did_you_mean(path, map(_short, get_all_subclass_paths(base)))
            raise ConfigError(f"there is no {base.__name__} {path!r}{near or choices(base)}")
        if len(named) > 1:
            raise ConfigError(f"{path} is the name of several: {', '.join(named)}; write the whole name of one")
        path = named[0]
    try:
        # 2. what it names
        cls = import_object(path)
    except Exception as error:  # importing somebody's module may raise anything
        near = _near(path, base)
        raise ConfigError(f"{path} can't be imported: {type(error).__name__}: {error}{near}") from None
    if not inspect.isclass(cls):
        if (calling := called(path, base)) is not None:
            raise ConfigError(f"{path} is a function; give the path alone, or {json.dumps(calling)}")
        return cls
    if not issubclass(cls, base):
        raise ConfigError(f"{path} is no {base.__name__}{choices(base)}")
    if is_abstract(cls):
        if there := choices(cls):
            raise ConfigError(f"{path} is what others are kinds of{there}")
        raise ConfigError(f"{path} can't be built: it lacks what every {base.__name__} has: {', '.join(lacks(cls))}")
    return cls


def called(path: str, base: type) -> dict[str, Any] | None:
    """Wraps the path of a plain function in the class that calls one, such as `CallableReward`; None: it is none."""
    wrapper = f"Callable{base.__name__}"
    if "." not in path or not any(name.endswith(f".{wrapper}") for name in get_all_subclass_paths(base)):
        return None
    try:
        named = import_object(path)
    except Exception:  # `find_class` says what is wrong
        return None
    if inspect.isclass(named) or not callable(named):
        return None
    return {"class_path": wrapper, "init_args": {"function": path}}


def _near(path: str, base: type) -> str:
    """Finds the class of a kind whose path is nearest: of the same module, or else of any."""
    module, _, name = path.rpartition(".")
    try:
        there = vars(importlib.import_module(module))
    except Exception:  # as above
        return did_you_mean(path, get_all_subclass_paths(base))
    fitting = [key for key, value in there.items() if not inspect.isclass(value) or issubclass(value, base)]
    near = did_you_mean(name, fitting)
    return near.replace("did you mean ", f"did you mean {module}.")


def lacks(cls: Any) -> list[str]:
    """Lists the abstract methods of a class, also where Python does not enforce them (Lightning's)."""
    return [name for name in dir(cls) if getattr(getattr(cls, name, None), "__isabstractmethod__", False)]


def is_abstract(cls: Any) -> bool:
    """Tells whether a class has abstract methods."""
    return bool(lacks(cls))


def kinds_of(base: type) -> dict[str, str]:
    """Lists the classes of a kind that can be built: dotted names by short ones, or by themselves if those clash."""
    paths = sorted(name for name in get_all_subclass_paths(base) if _can_be_built(name))
    words = Counter(map(_short, paths))
    return {_short(path) if words[_short(path)] == 1 else path: path for path in paths}


def _short(path: str) -> str:
    return path.rpartition(".")[2]


def _can_be_built(name: str) -> bool:
    try:
        return not is_abstract(import_object(name))
    except (ImportError, AttributeError):  # made while running, as Lightning wraps optimizers
        return False


def choices(base: type) -> str:
    """Formats a line with the names of all classes of a kind."""
    names = sorted(kinds_of(base))
    return f"\n  there are {', '.join(names)}" if names else ""


def name_of(kind: Any) -> str:
    """Names a type as people write it."""
    kind = getattr(kind, "cls", kind)
    return kind.__name__ if inspect.isclass(kind) and not typing.get_args(kind) else type_to_str(kind)


def is_list(kind: Any) -> bool:
    """Tells whether a type takes lists."""
    return any(typing.get_origin(member) in LISTS or member in LISTS for member in members(kind))
