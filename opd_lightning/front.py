"""Answers of `opd` before the libraries are loaded: help, the version, and errors in commands and files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from .command_help import help_of
from .config_file import ConfigError, Source, did_you_mean, said
from .entry_points import COMMANDS, commands, registered
from .shipped import PREFIX, shipped

RUNS = {
    "fit": "trains a student",
    "validate": "measures the student on held-out examples",
    "test": "does the same on the test examples, as a table",
    "predict": "writes what the student answers, one JSON line per example",
}
"""Commands of Lightning's Trainer; all others are registered by entry points."""
KEYS = {
    "model": "the setting: student, teachers, objective, rollout, reward, …",
    "data": "prompts, for training and held out",
    "trainer": "Lightning's Trainer: steps, devices, precision, callbacks, logger, default_root_dir, …",
    "checkpoint": "when checkpoints are written",
    "seed_everything": "decides everything that is drawn (default: 0)",
    "ckpt_path": "the checkpoint to go on from: a path, or last",
    "weights_only": "how Lightning loads it",
}
CKPT_PATH = "the checkpoint whose student is asked: a path, or last; without it the student is as yet untrained"
ONLY_IN = {
    "verbose": ("validate", "test"),
    "return_predictions": ("predict",),
}


def keys_of(command: str) -> list[str]:
    """Lists the keys at the top of a command's configuration."""
    return [*KEYS, *(key for key, commands in ONLY_IN.items() if command in commands)]


def meanings(command: str) -> dict[str, str]:
    """Describes each key at the top of a command's configuration."""
    descriptions = KEYS if command == "fit" else KEYS | {"ckpt_path": CKPT_PATH}
    return {key: descriptions.get(key, "as in Lightning") for key in keys_of(command)}


def overview() -> str:
    """Formats the help of `opd`: all commands."""
    lines = "\n".join(f"  {name:<14}{what}" for name, what in (RUNS | commands()).items())
    return (
        f"usage: opd COMMAND …\n\nOn-policy distillation.\n\n{lines}\n\n"
        "  -h, --help  this; `opd COMMAND --help` says more\n"
        "  --version   of opd-lightning and the libraries that it runs on\n"
    )


def page(command: str) -> str:
    """Formats the help of a command of Lightning's Trainer."""
    keys = "\n".join(f"  --{key:<19}{what}" for key, what in meanings(command).items())
    return (
        f"usage: opd {command} -c FILE [-c FILE …] [--key=value …]\n\n{RUNS[command].capitalize()}.\n\n"
        "Files are YAML; later ones replace what they name (teachers are merged by name, null removes one), `key+:`\n"
        "appends to a list, and the command line wins over every file. opd:text/quickstart.yaml is one that ships.\n\n"
        f"{keys}\n\n"
        "  --print_config       everything that can be set, as it is set, and exit\n"
        "  --traceback          where an error was raised, not only what is wrong\n"
        "  --KEY.help [CLASS]   what a key takes: --trainer.help, --model.help TextDistillation,\n"
        "                       --model.evaluation.help, --model.objective.terms.signal.help ReverseKL, …\n"
    )


def installed() -> dict[str, str]:
    """Returns the versions of this package, the libraries below it and Python, by name."""
    versions = {}
    for name in ("opd-lightning", "lightning", "torch", "transformers", "peft", "diffusers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "(not installed)"
    return {**versions, "Python": sys.version.split()[0]}


def versions() -> str:
    """Formats the versions of this package and the libraries below it."""
    lines = [f"{name} {number}" for name, number in installed().items()]
    return f"{lines[0]}\n{', '.join(lines[1:])}\n"


def resolve(argument: str) -> str:
    """Replaces ``opd:…`` in an argument by the path of the shipped configuration."""
    flag, equals, value = argument.rpartition("=")
    return f"{flag}{equals}{shipped(value)}" if value.startswith(PREFIX) and value.endswith(".yaml") else argument


def front(arguments: Sequence[str]) -> list[Source]:
    """Prints help or versions and exits, if asked to; otherwise returns files and arguments as sources, in order.

    Raises:
        ConfigError: there is no such command, file or key at the top.
        FileNotFoundError: nothing of that name is shipped.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        _exit_with(overview())
    if arguments[0] == "--version":
        _exit_with(versions())
    command = arguments[0]
    if command not in RUNS:
        known = [*RUNS, *commands()]
        if command not in known:
            near = did_you_mean(command, known)
            raise ConfigError(f"there is no command {command!r}{near}; there are {', '.join(known)}")
        if {"-h", "--help"} & set(arguments) and (text := help_of(registered(COMMANDS)[command])) is not None:
            _exit_with(text)
        return []
    if {"-h", "--help"} & set(arguments):
        _exit_with(page(command))
    sources = said([resolve(argument) for argument in arguments[1:]])
    known = keys_of(command)
    for source in sources:
        for key in source.values:
            if key.removesuffix("+") not in known:
                what = f"{key}: opd {command} has no such key{did_you_mean(key, known)}\n  it has {', '.join(known)}"
                raise ConfigError(f"{what}\n  in {source.place((key,)) or source.place(source.keys)}")
    return sources


def _exit_with(text: str) -> NoReturn:
    sys.stdout.write(text)
    sys.exit(0)
