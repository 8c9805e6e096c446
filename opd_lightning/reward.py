"""Verifiers: a completion and its example in, a number out, or None where they abstain."""

import importlib
import importlib.util
import json
import math
import re
import select
import subprocess
import sys
import weakref
from abc import ABC, abstractmethod
from ast import literal_eval
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

Example = Mapping[str, Any]
_MATH_WORKER = Path(__file__).with_name("math_worker.py")


class Reward(ABC):
    """What a reward is: a function of a completion and its example, and the columns that it reads.

    It returns a finite number, or a bool, or None where it abstains: such a row counts in no mean (`Scoring` has the
    details, and what becomes of rewards that fail). `columns` are canonical names; the data module refuses a data
    set that lacks one, before training.
    """

    columns: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, completion: str, example: Example) -> float | None: ...


class ExactMatch(Reward):
    """1 if the completion is the example's `answer`, else 0.

    Args:
        strip: whether white space around both texts is ignored.
        ignore_case: whether both texts are case-folded.
        after: compare only what follows the last occurrence of this marker ("####", "="); default: the whole text
            (an empty string and no None: YAML would read a "#" of an optional string as a comment). A completion
            without the marker scores 0; an answer without it is taken whole.
    """

    columns = ("answer",)

    def __init__(self, strip: bool = True, ignore_case: bool = False, after: str = "") -> None:
        self.strip, self.ignore_case, self.after = strip, ignore_case, after

    def __call__(self, completion: str, example: Example) -> float:
        answer = _answer("ExactMatch", example, self.after)
        found = _tail(completion, self.after)
        return float(found is not None and self._normal(found) == self._normal(answer))

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


class RelaxedMatch(Reward):
    """1 if the completion is the example's `answer` up to the relaxed accuracy of ChartQA (2203.10244, section 5.1).

    Where both are numbers and the answer is not 0, the completion may be off by 5 % of the answer; otherwise both
    are compared as texts, ignoring case and white space around them. A number is a text that is one as a whole; with
    a percent sign at its end it counts as hundredths, as in the scorer that the field uses (pix2struct).

    Args:
        tolerance: the largest difference, as a share of the answer's size.
        after: as in `ExactMatch`.

    Raises:
        ValueError: the tolerance is negative.
    """

    columns = ("answer",)

    def __init__(self, tolerance: float = 0.05, after: str = "") -> None:
        if tolerance < 0:
            raise ValueError(f"RelaxedMatch.tolerance is {tolerance}; it must be at least 0")
        self.tolerance, self.after = tolerance, after

    def __call__(self, completion: str, example: Example) -> float:
        answer = _answer("RelaxedMatch", example, self.after).strip()
        found = _tail(completion, self.after)
        if found is None:
            return 0.0
        right, said = _number(answer), _number(found.strip())
        if right and said is not None:
            return float(abs(said - right) <= self.tolerance * abs(right))
        return float(found.strip().casefold() == answer.casefold())


class RegexMatch(Reward):
    """1 if what a regular expression extracts from the completion is the example's `answer`, else 0.

    White space around both is ignored. A completion in which the pattern is not found scores 0.

    Args:
        pattern: a Python regular expression.
        group: number or name of the group that holds the answer; 0 is the whole match.
        which: which of several matches counts.

    Raises:
        ValueError: the pattern is invalid, or it has no such group.
    """

    columns = ("answer",)

    def __init__(self, pattern: str, group: int | str = 1, which: Literal["first", "last"] = "last") -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"RegexMatch.pattern {pattern!r} is not a regular expression: {error}") from None
        groups = [*range(self.pattern.groups + 1), *self.pattern.groupindex]
        if group not in groups:
            raise ValueError(
                f"RegexMatch.group is {group!r}, but the pattern {pattern!r} has these groups: "
                f"{', '.join(map(str, groups))} (0 is the whole match)"
            )
        if which not in ("first", "last"):
            raise ValueError(f"RegexMatch.which is {which!r}; it must be 'first' or 'last'")
        self.group, self.which = group, which

    def __call__(self, completion: str, example: Example) -> float:
        answer = _answer("RegexMatch", example)
        found = [match[self.group] for match in self.pattern.finditer(completion)]
        if not found:
            return 0.0
        extracted = found[-1 if self.which == "last" else 0]
        return float(extracted is not None and extracted.strip() == answer.strip())


class MathVerify(Reward):
    """1 if math-verify finds the completion mathematically equal to the example's `answer`, else 0.

    math-verify bounds its time with signals, which only work on the main thread, so each comparison runs in a
    process of its own that is killed when it is late. Nothing that a completion contains raises: a
    comparison that could not be made scores 0 and is counted in `failures`, by kind.

    Args:
        timeout: seconds for one comparison, without the worker's start.
        after: as in `ExactMatch`.

    Raises:
        ModuleNotFoundError: math-verify is not installed.
        ValueError: the timeout is not positive, or the marker is empty.
    """

    columns = ("answer",)
    start_timeout = 120.0  # importing sympy takes seconds on a busy machine

    def __init__(self, timeout: float = 5.0, after: str = "") -> None:
        if timeout <= 0:
            raise ValueError(f"MathVerify.timeout is {timeout} s; it must be greater than 0")
        if importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError("MathVerify needs the package math-verify: pip install math-verify")
        self.timeout, self.after = timeout, after
        self.failures: Counter[str] = Counter()
        self._worker: subprocess.Popen[bytes] | None = None

    def __call__(self, completion: str, example: Example) -> float:
        answer = _answer("MathVerify", example, self.after)
        found = _tail(completion, self.after)
        if found is None:
            return 0.0
        verdict = self._ask(answer, found)
        if verdict in ("right", "wrong"):
            return float(verdict == "right")
        self.failures[verdict] += 1
        return 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_worker": None}  # a process can be neither copied nor pickled

    def _ask(self, answer: str, completion: str) -> str:
        """What the worker found: right, wrong, or the reason why it found nothing."""
        try:
            if self._worker is None:
                # Not multiprocessing: its children import the user's script again, which need not be guarded.
                # -P keeps the modules beside the worker's file from shadowing top-level ones.
                self._worker = subprocess.Popen(
                    [sys.executable, "-P", _MATH_WORKER],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
                weakref.finalize(self, _kill, self._worker)
                _exchange(self._worker, None, self.start_timeout)
            return _exchange(self._worker, [answer, completion, self.timeout], self.timeout)
        except (TimeoutError, OSError) as error:
            if self._worker is not None:
                _kill(self._worker)
            self._worker = None
            return "timeout" if isinstance(error, TimeoutError) else "worker died"


class ReasoningGymScore(Reward):
    """reasoning-gym's own score of the completion, in [0, 1]; partial marks are its own too.

    For examples that come from `reasoning_gym:TASK`, whose `task` and `metadata` it needs. A scorer that
    fails on a completion scores 0 and is counted in `failures`, by kind of error.

    Args:
        after: hand over only what follows the last occurrence of this marker; without it the score is 0.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
        ValueError: the marker is empty.
    """

    columns = ("task", "metadata")

    def __init__(self, after: str = "") -> None:
        import_reasoning_gym("ReasoningGymScore")
        self.after = after
        self.failures: Counter[str] = Counter()

    def __call__(self, completion: str, example: Example) -> float:
        task = _column("ReasoningGymScore", "task", example)
        metadata = _column("ReasoningGymScore", "metadata", example)
        found = _tail(completion, self.after)
        if found is None:
            return 0.0
        scorer = _reasoning_gym_scorer(task)
        entry = {
            "question": example.get("prompt"),
            "answer": example.get("answer"),
            "metadata": decode_metadata(metadata) if isinstance(metadata, str) else metadata,
        }
        try:
            return float(scorer(found.strip(), entry))
        except Exception as error:
            self.failures[type(error).__name__] += 1
            return 0.0


class CallableReward(Reward):
    """Any plain function `f(completion: str, example: dict) -> float | None` as a reward.

    Args:
        function: its dotted path, such as "my_package.rewards.brevity".
        columns: the canonical columns that it reads, so that their absence is found at the start.

    Raises:
        ValueError: there is no such module or function, or it can't be called.
    """

    def __init__(self, function: str, columns: tuple[str, ...] = ()) -> None:
        self.function = import_callable(function, "CallableReward.function")
        self.columns = tuple(columns)

    def __call__(self, completion: str, example: Example) -> float | None:
        answer: float | None = self.function(completion, example)
        return answer


def import_callable(path: str, key: str) -> Callable[..., Any]:
    """The callable at a dotted path; `key` names the setting that holds the path, for the messages."""
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
    """The package reasoning_gym; where it is missing, an error that names the extra."""
    try:
        return importlib.import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{who} needs the package reasoning-gym: pip install "opd-lightning[tasks]"'
        ) from error


def decode_metadata(text: str) -> Any:
    """What the column `metadata` says, written as JSON or as a Python literal. Nothing in it is executed."""
    try:
        return json.loads(text)
    except ValueError:
        return literal_eval(text)


@cache
def _reasoning_gym_scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    gym = import_reasoning_gym("ReasoningGymScore")
    try:
        return gym.get_score_answer_fn(task)
    except ValueError as error:
        raise ValueError(f"the column 'task' names {task!r}, which is no task of reasoning-gym") from error


def _column(who: str, name: str, example: Example) -> Any:
    if example.get(name) is None:
        raise ValueError(f"{who} needs the column {name!r}; this example has {', '.join(map(str, example))}")
    return example[name]


def _answer(who: str, example: Example, marker: str = "") -> str:
    """The example's answer; of a worked one, what follows its last marker."""
    answer = str(_column(who, "answer", example))
    tail = _tail(answer, marker)
    return answer if tail is None else tail


def _number(text: str) -> float | None:
    """The finite number that a text is; with a percent sign at its end in hundredths."""
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _tail(text: str, marker: str) -> str | None:
    """What follows the last marker; the whole text without a marker to look for; none where it is absent."""
    if not marker:
        return text
    _, found, tail = text.rpartition(marker)
    return tail if found else None


def _exchange(worker: "subprocess.Popen[bytes]", question: list[Any] | None, timeout: float) -> str:
    """Send a line, if any, and wait for a line."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    if question is not None:
        worker.stdin.write(json.dumps(question).encode() + b"\n")
        worker.stdin.flush()
    if not select.select([worker.stdout], [], [], timeout)[0]:
        raise TimeoutError
    line = worker.stdout.readline()
    if not line:
        raise BrokenPipeError
    return line.decode().strip()


def _kill(worker: "subprocess.Popen[bytes]") -> None:
    with suppress(OSError), worker:
        worker.kill()
