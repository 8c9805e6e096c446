"""Finds what packages add to `opd` by entry points in their ``pyproject.toml``: sub-commands and parts.

In the group ``opd_lightning.commands``, ``hello = "my_package.tool:main"`` registers `opd hello`: a function of the
arguments that follow, whose docstring's first line is its help; more of it is read from its file, too
(`command_help.py`). In the group ``opd_lightning.parts``,
``mine = "my_package.parts"`` names a module whose classes have short names in configurations. A list of all commands
imports none of them.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import EntryPoint, distributions
from importlib.util import find_spec
from pathlib import Path

from .config_file import ConfigError

COMMANDS, PARTS = "opd_lightning.commands", "opd_lightning.parts"
OURS = "opd-lightning"


@cache
def registered(group: str) -> dict[str, EntryPoint]:
    """Finds the entry points of a group by name; of two of one name, this package's own wins, or the first on the path.

    Raises:
        ConfigError: none is this package's own: it was installed before it had any, or not at all.
    """
    # `entry_points()` would see of this package only an egg-info that an early installation left in the folder
    entries = [entry for package in distributions() for entry in package.entry_points if entry.group == group]
    entries.sort(key=_is_ours, reverse=True)
    if not any(map(_is_ours, entries)):
        raise ConfigError(
            f"{OURS} has registered no {group}: this installation is older than its code; run `pip install -e .` again "
            "in its folder"
        )
    # of one name the last stays, which is the first of the list
    return {entry.name: entry for entry in reversed(entries)}


def _is_ours(entry: EntryPoint) -> bool:
    return entry.dist is not None and entry.dist.name == OURS


def commands() -> dict[str, str]:
    """Lists the registered sub-commands with what each does."""
    return {name: summary(entry) for name, entry in sorted(registered(COMMANDS).items())}


def command(name: str) -> Callable[[Sequence[str]], None]:
    """Imports what a sub-command runs."""
    function: Callable[[Sequence[str]], None] = registered(COMMANDS)[name].load()
    return function


def file_of(module: str) -> Path | None:
    """Finds the file of a module without importing it; None: there is none."""
    top, *inner = module.split(".")
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*inner) if inner else Path(spec.origin)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def summary(entry: EntryPoint) -> str:
    """Reads the first line of a function's docstring from its file; empty where there is none."""
    file = file_of(entry.module)
    for node in ast.parse(file.read_text(encoding="utf-8")).body if file else ():
        if isinstance(node, ast.FunctionDef) and node.name == entry.attr:
            text = (ast.get_docstring(node) or "").partition("\n")[0].removesuffix(".")
            return text[:1].lower() + text[1:]
    return ""


def import_parts() -> None:
    """Imports all parts, so that their classes are known by short names; another package's that fails is warned of."""
    for name, entry in registered(PARTS).items():
        try:
            entry.load()
        except Exception as error:  # importing somebody's module may raise anything
            if _is_ours(entry):
                raise
            warnings.warn(f"the parts {name} ({entry.value}) can't be imported: {error!r}", stacklevel=2)


def packages() -> set[str]:
    """Names the packages that have registered parts."""
    return {entry.module.partition(".")[0] for entry in registered(PARTS).values()}
