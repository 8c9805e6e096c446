"""Errors for people: the key, its fault, accepted values, and the file that holds it."""

from __future__ import annotations

import dis
import re
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, ClassVar, NoReturn

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .catalog import bases_of
from .config_file import Source, did_you_mean
from .places import about, place_of
from .printable import printable

# Lines of jsonargparse about its search, not about the fault
_NOISE = re.compile(r"^(- )?(Does not validate|Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value)")
_KEY = re.compile(r'^(?:- )?Parser key "([^"]+)":')
_CLASS = re.compile(r"^(?:- )?Problem with given class_path '([^']+)'")
_REQUIRED = re.compile(r"^the following arguments are required: (.*)")
_EXPECTED = re.compile(r"^Expected an? (?:typing\.|<class ')?([\w.\[\], '-]+?)'?>?(?:\. Got value: (.*))?$")
LONGEST = 600
"""Characters of a message; transformers lists all the models that it knows."""
_CHECKS = (ValueError, TypeError, RuntimeError, OSError, ImportError, ArithmeticError, MisconfigurationException)


class Parser(LightningArgumentParser):
    """Parser that prints the innermost problem in place of jsonargparse's account of everything that it tried."""

    sources: ClassVar[list[Source]] = []
    checked: ClassVar[list[tuple[Source, Any]]] = []  # the sources, each with its checked values

    def dump(self, *args: Any, **settings: Any) -> str:
        """Writes a configuration; what was parsed was checked then, and is not checked again."""
        if "skip_none" in settings:  # Lightning's name for it, which jsonargparse warns of
            settings["skip_unset"] = settings.pop("skip_none")
        return str(super().dump(*args, **{"skip_validation": True, **settings}))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        sys.stderr.write(printable(explain(message, self.sources)))
        sys.exit(2)


def explain(message: str, sources: Sequence[Source]) -> str:
    """Shortens an error message of jsonargparse, and adds the file and line that hold the key."""
    if match := _REQUIRED.match(message):
        keys = " and ".join(sorted(key.rpartition(".")[2] for key in match.group(1).split(", ")))
        below = next((bases for source in sources if (bases := bases_of(source.name))), ["-c opd:text/quickstart.yaml"])
        return f"error: nothing here has the key {keys}; put a configuration first that has: {' or '.join(below)}\n"
    path: list[str] = []
    problems: list[str] = []
    for line in message.splitlines():
        text = line.strip()
        if match := _KEY.match(text):
            if not problems:
                path += match.group(1).split(".")
            text = text[match.end() :].strip()
        elif _CLASS.match(text):
            continue
        if text and not _NOISE.match(text):
            problems.append(text.removeprefix("- "))
    if not problems:
        return f"error: {message}\n"
    expected = list(dict.fromkeys(match.group(1) for text in problems if (match := _EXPECTED.match(text))))
    what = problems[0]
    if match := _EXPECTED.match(what):
        values = message.rpartition("Given value: ")[2].splitlines() if "Given value: " in message else []
        shown_value = values and len(values[0]) < 80 and not values[0].startswith(("{", "NestedArg("))
        given = match.group(2) or (values[0] if shown_value else None)
        what, problems = _expected(expected, given), problems[:1]
    lines = [f"error: {'.'.join(path)}: {what}" if path else f"error: {what}"]
    lines += [f"  in {place}" for place in [place_of(path, sources, message)] if place]
    return "\n".join([*lines, *(f"  {problem}" for problem in problems[1:4])]) + "\n"


def _expected(types: Sequence[str], given: str | None) -> str:
    words = [word for name in types for word in re.findall(r"'([^']*)'", name) if name.startswith("Literal")]
    accepted = [f"one of {', '.join(words)}"] if words else []
    accepted += [name for name in types if not name.startswith("Literal")]
    return f"expected {' or '.join(accepted)}" + (f", got {given}{did_you_mean(given, words)}" if given else "")


def sentence(error: BaseException, sources: Sequence[Source]) -> str | None:
    """Formats the error of a check of a configuration, data or a model; None for any other error: a bug.

    A check raises by itself, in this package or in the constructor of a part, or the system refuses a file. An error
    in the middle of a computation is no check's, unless a part that a configuration names is being built.
    """
    cause = _cause(error)
    frames = list(_frames(cause.__traceback__))
    selves = [type(frame.tb_frame.f_locals.get("self")).__name__ for frame in frames]
    built = [name for name, frame in zip(selves, frames, strict=True) if _constructs(frame)]
    key, place = about(str(cause), built, sources)
    what = str(cause) if len(str(cause)) < LONGEST else f"{str(cause)[:LONGEST]} …"
    if not _checks(cause, frames, selves):
        if not (built and (key or place) and any(_builds(frame) for frame in frames)):
            return None
        what = f"{key or built[-1]} can't be built from this: {type(cause).__name__}: {what}"
    text = f"error: {key}: {what}" if key and not what.startswith(key) else f"error: {what}"
    return text + (f"\n  in {place}" if place else "") + "\n  (--traceback shows where this was raised)\n"


def _cause(error: BaseException) -> BaseException:
    """Unwraps an error that jsonargparse raised from another one."""
    while error.__cause__ is not None:
        frames = list(_frames(error.__traceback__))
        if not frames or not _module(frames[-1]).startswith("jsonargparse"):
            break
        error = error.__cause__
    return error


def _frames(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _module(frame: TracebackType) -> str:
    return str(frame.tb_frame.f_globals.get("__name__", ""))


def _builds(frame: TracebackType) -> bool:
    return _module(frame).startswith("jsonargparse") or frame.tb_frame.f_code.co_name == "_instantiate_trainer"


def _constructs(frame: TracebackType) -> bool:
    return frame.tb_frame.f_code.co_name in ("__init__", "__post_init__") and "self" in frame.tb_frame.f_locals


def _checks(cause: BaseException, frames: Sequence[TracebackType], selves: Sequence[str]) -> bool:
    """Tells whether a ``raise`` raised it, and no failed operation: ours, a constructor's, a loader's."""
    if not isinstance(cause, _CHECKS) or not frames:
        return False
    if isinstance(cause, MisconfigurationException) or (isinstance(cause, OSError) and cause.filename is not None):
        return True
    ours = _module(frames[-1]).startswith("opd_lightning")
    return _raises(frames[-1]) and (ours or _constructs(frames[-1]) or "Pretrained" in selves)


def _raises(frame: TracebackType) -> bool:
    return dis.opname[frame.tb_frame.f_code.co_code[frame.tb_lasti]] == "RAISE_VARARGS"
