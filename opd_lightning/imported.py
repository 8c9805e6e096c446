"""Importing what a configuration names: a callable by its dotted path, or a package that an extra brings."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any


def import_callable(path: str, key: str) -> Callable[..., Any]:
    """Imports the callable at a dotted path; `key` names the setting that holds the path, for messages.

    Raises:
        ValueError: there is no such module or function, or it can't be called.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"{key}: {path!r} is not a dotted path such as 'my_package.my_module.my_function'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{key}: {path!r} can't be imported: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{key}: the module {module_name!r} has no {name!r}")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{key}: {path!r} is a {type(function).__name__}, not a callable")
    return function


def import_reasoning_gym(who: str) -> ModuleType:
    """Imports the package reasoning_gym.

    Raises:
        ModuleNotFoundError: it is missing; the message names the extra.
    """
    try:
        return importlib.import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        raise no_reasoning_gym(who) from error


def no_reasoning_gym(who: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f'{who} needs the package reasoning-gym: pip install "opd-lightning[tasks]"')
