"""Places in files and arguments of the setting that an error is about; none where that is ambiguous."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .config_file import Keys, Source, Text, dotted, load

_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
SHORTEST = 3
"""Characters of a value that a message may name without quotes; anything shorter is there by chance."""


class Setting(NamedTuple):
    """Setting that holds in the end, after all overlays.

    Attributes:
        keys: as people write them, with places in lists and without ``init_args``.
        source, place: index of the file or argument that sets it, and the place there.
    """

    keys: Keys
    value: Any
    source: int
    place: str

    @property
    def names(self) -> list[str]:
        """Its keys as messages name them, without places in lists."""
        return [key for key in self.keys if isinstance(key, str)]


def settings_of(sources: Sequence[Source]) -> list[Setting]:
    """Collects the settings of files and arguments, without those that a later one replaces."""
    settings: list[Setting] = []
    for number, source in enumerate(sources):
        new = []
        for keys, value in _walk((), source.values):
            if source.keys and len(keys) < len(source.keys):
                continue  # an argument speaks of its last key
            new.append(Setting(_short(keys), value, number, source.place(keys) or source.place(source.keys) or ""))
        gone = [setting.keys for setting in new if not isinstance(setting.value, dict) and not _appends(source)]
        gone += [setting.keys[:-1] for setting in new if _renames(setting, settings)]
        settings = [old for old in settings if not any(old.keys[: len(keys)] == keys for keys in gone)] + new
    return settings


def _walk(keys: Keys, value: Any) -> Iterator[tuple[Keys, Any]]:
    value = load(str(value)) if isinstance(value, Text) else value
    if keys:
        yield keys, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield from _walk((*keys, key), below)


def _short(keys: Keys) -> Keys:
    return tuple(key if isinstance(key, int) else str(key).removesuffix("+") for key in keys if key != "init_args")


def _appends(source: Source) -> bool:
    return any(str(key).endswith("+") for key in source.keys)


def _renames(setting: Setting, before: Sequence[Setting]) -> bool:
    """Tells whether a setting names another class, so that the arguments of the one before are gone."""
    if setting.keys[-1:] != ("class_path",):
        return False
    earlier = [old for old in before if old.keys in (setting.keys, setting.keys[:-1]) and isinstance(old.value, str)]
    return any(_class(old.value) != _class(setting.value) for old in earlier)


def _class(path: Any) -> str:
    return str(path).rpartition(".")[2]


def about(message: str, made: Sequence[str], sources: Sequence[Source]) -> tuple[str, str]:
    """Finds the key and the place of the setting that a message is about; either may be empty.

    A message may name the key. Otherwise it is about the part under construction, or that of its arguments whose value
    the message names.

    Args:
        made: classes under construction, outermost first.
    """
    everything = settings_of(sources)
    # 1. keys that the message names
    for name in _DOTTED.findall(message):
        if matching := [setting for setting in everything if _contains(setting.names, name.split("."))]:
            meant = _meant(matching, message)
            return "", meant.place if meant else ""
    # 2. parts under construction, innermost first, the last file or argument first
    for who in reversed(made):
        for part in reversed(everything):
            named = isinstance(part.value, str) and _class(part.value) == who
            if named or (who == "Trainer" and part.keys == ("trainer",)):
                keys = part.keys[:-1] if part.keys[-1] == "class_path" else part.keys
                inside = [setting for setting in everything if setting.keys[: len(keys)] == keys]
                meant = _meant(inside, message)
                return dotted(meant.keys if meant and _named(meant, message, SHORTEST) else keys), (
                    meant.place if meant else ""
                )
    return "", ""


def place_of(path: Sequence[str], sources: Sequence[Source], message: str = "") -> str | None:
    """Finds the place of a key of jsonargparse's, or of its holder: such keys lack list places and teachers' names."""
    everything, wanted = settings_of(sources), [key for key in path if key != "init_args"]
    while wanted:
        matching = []
        for setting in everything:
            rest = iter(setting.names)
            if all(key in rest for key in wanted):
                matching.append(setting)
        if matching:
            meant = _meant(matching, message)
            return meant.place or None if meant else None
        wanted.pop()
    return None


def _contains(names: Sequence[str], wanted: Sequence[str]) -> bool:
    return any(names[at : at + len(wanted)] == wanted for at in range(len(names)))


def _meant(candidates: Sequence[Setting], message: str) -> Setting | None:
    """Selects the setting that a message names by value or key, or the outermost if one source has all; else None."""
    for shortest in (0, SHORTEST):
        named = [setting for setting in candidates if _named(setting, message, shortest)]
        if len({setting.place for setting in named}) == 1:
            return named[0]
    return candidates[0] if len({setting.source for setting in candidates}) == 1 else None


def _named(setting: Setting, message: str, shortest: int) -> bool:
    """Tells whether a setting's value or last key is in a message: in quotes, or as a word of some length."""
    value = setting.value
    words = [setting.names[-1]] if setting.names and not shortest else []
    words += [str(value)] if not isinstance(value, dict | list | bool) and value is not None else []
    if not shortest:
        return any(f"'{word}'" in message for word in words)
    return any(len(word) >= shortest and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message) for word in words)
