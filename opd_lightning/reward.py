"""Rewards: functions of a completion and its example that return a number, or None where they abstain."""

import importlib.util
import json
import math
import re
from abc import ABC, abstractmethod
from ast import literal_eval
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from .imported import import_callable, no_reasoning_gym
from .isolated import Isolated
from .time_limit import TooLate, within

Example = Mapping[str, Any]


class Reward(ABC):
    """Reward: a function of a completion and its example, and the columns that it reads.

    It returns a finite number, or a bool, or None where it abstains: such a row counts in no mean (`Scoring` has the
    details, and what becomes of rewards that fail). `columns` are canonical names; the data module refuses a data
    set that lacks one, before training. A method `prepare`, where there is one, comes before each call and is not
    timed: for what takes long to start. A method `ahead(completions, examples)` learns of all that will be asked for
    one by one, so that it can begin with them together; what `measured()` returns, a number by name, is logged as
    ``train/judge/<name>`` (of the judge of a note ``train/feedback/<name>``).
    """

    columns: tuple[str, ...] = ()
    timed: bool = True
    """Whether `Scoring.timeout` holds; False where it has time limits of its own."""

    @abstractmethod
    def __call__(self, completion: str, example: Example) -> float | None: ...

    def feedback(self, completion: str, example: Example) -> str | None:
        """Says in words what is to be said of a completion, for the note `Feedback`; None (default): nothing."""
        return None


class ExactMatch(Reward):
    """Reward of 1 if the completion is the example's `answer`, else 0.

    Args:
        strip: whether white space around both texts is ignored.
        ignore_case: whether both texts are case-folded.
        after: compare only what follows the last occurrence of this marker ("####", "="); default: the whole text
            (an empty string and no None: YAML would read a "#" of an optional string as a comment). A completion
            without the marker scores 0; an answer without it is taken whole.
    """

    columns: tuple[str, ...] = ("answer",)

    def __init__(self, strip: bool = True, ignore_case: bool = False, after: str = "") -> None:
        self.strip, self.ignore_case, self.after = strip, ignore_case, after

    def __call__(self, completion: str, example: Example) -> float:
        answer = _answer("ExactMatch", example, self.after)
        guess = _tail(completion, self.after)
        return float(guess is not None and self._normal(guess) == self._normal(answer))

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


class RelaxedMatch(Reward):
    """Reward of 1 if the completion is the example's `answer` up to ChartQA's relaxed accuracy, else 0.

    After section 5.1 of 2203.10244. Where both are numbers and the answer is not 0, the completion may be off by 5
    % of the answer; otherwise both are compared as texts, ignoring case and white space around them. A number is a
    text that is one as a whole; with a percent sign at its end it counts as hundredths, as in the scorer that the
    field uses (pix2struct).

    Args:
        tolerance: the largest difference, as a share of the answer's size.
        after: as in `ExactMatch`.

    Raises:
        ValueError: the tolerance is negative.
    """

    columns = ("answer",)

    def __init__(self, tolerance: float = 0.05, after: str = "") -> None:
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"RelaxedMatch.tolerance is {tolerance}; it must be a number of at least 0")
        self.tolerance, self.after = tolerance, after

    def __call__(self, completion: str, example: Example) -> float:
        answer = _answer("RelaxedMatch", example, self.after).strip()
        guess = _tail(completion, self.after)
        if guess is None:
            return 0.0
        right, guessed = _number(answer), _number(guess.strip())
        # of 0 there is no share: such an answer is compared as text
        if right and guessed is not None:
            return float(abs(guessed - right) <= self.tolerance * abs(right))
        return float(guess.strip().casefold() == answer.casefold())


class RegexMatch(Reward):
    """Reward of 1 if a regular expression extracts the example's `answer` from the completion, else 0.

    White space around both is ignored. A completion in which the pattern is not found scores 0, and so does one over
    which the search takes too long, as it may where repetitions are nested; that is counted in `failures`.

    Args:
        pattern: a Python regular expression.
        group: number or name of the group that holds the answer; 0 is the whole match.
        which: which of several matches counts.
        timeout: seconds for one search.

    Raises:
        ValueError: the pattern is invalid, or it has no such group; the timeout is not positive.
    """

    columns = ("answer",)

    def __init__(
        self, pattern: str, group: int | str = 1, which: Literal["first", "last"] = "last", timeout: float = 2.0
    ) -> None:
        _check_timeout("RegexMatch", timeout)
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
        self.group, self.which, self.timeout = group, which, timeout
        self.failures: Counter[str] = Counter()

    def __call__(self, completion: str, example: Example) -> float:
        answer = _answer("RegexMatch", example)
        try:
            matches = within(self.timeout, lambda: [match[self.group] for match in self.pattern.finditer(completion)])
        except TooLate:
            self.failures["timeout"] += 1
            return 0.0
        if not matches:
            return 0.0
        extracted = matches[-1 if self.which == "last" else 0]
        return float(extracted is not None and extracted.strip() == answer.strip())


class JSONForm(Reward):
    """Reward of 1 if the completion is one JSON object with these keys, each a text, and nothing else around it.

    Its feedback says what the form is, and which part of it is missing first.

    Args:
        keys: all that the object has. Default: ``answer``.
        words: most words of all its texts together. Default: any number.

    Raises:
        ValueError: no keys, or fewer than one word.
    """

    def __init__(self, keys: tuple[str, ...] = ("answer",), words: int | None = None) -> None:
        if not keys:
            raise ValueError("JSONForm.keys is empty; name at least one key")
        if words is not None and words < 1:
            raise ValueError(f"JSONForm.words must be >= 1, got {words}")
        self.keys, self.words = tuple(keys), words

    def __call__(self, completion: str, example: Example) -> float:
        return float(self._fault(completion) is None)

    def feedback(self, completion: str, example: Example) -> str | None:
        fault = self._fault(completion)
        form = json.dumps(dict.fromkeys(self.keys, "..."))
        return None if fault is None else f"The answer {fault}. Write {form} and nothing else."

    def _fault(self, completion: str) -> str | None:
        """Says what keeps a completion from the form; None where nothing does."""
        try:
            value = json.loads(completion)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            return "is no JSON object"
        if value.keys() != set(self.keys):
            return f"has the keys {json.dumps([*value])} instead of {json.dumps(self.keys)}"
        if odd := [key for key, text in value.items() if not isinstance(text, str)]:
            return f"has no text under {odd[0]}"
        count = sum(len(text.split()) for text in value.values())
        if self.words is not None and count > self.words:
            return f"has {count} words, which is more than {self.words}"
        return None


class Mentions(Reward):
    """Reward of 1 if the completion contains the example's `answer` as whole words, in whatever case, else 0.

    An entry of the column `aliases`, where there is one, does as well. Free text and texts in a form are judged alike.
    """

    columns = ("answer",)

    def __call__(self, completion: str, example: Example) -> float:
        answers = [_answer("Mentions", example), *(example.get("aliases") or [])]
        # not \b, which needs a letter at both ends of the answer: it may be "C++"
        return float(any(re.search(rf"(?<!\w){re.escape(a)}(?!\w)", completion, re.IGNORECASE) for a in answers))


class MathVerify(Reward):
    """Reward of 1 if math-verify finds the completion mathematically equal to the example's `answer`, else 0.

    Each comparison runs in a process of its own that is killed when it is late (`Isolated`). Nothing that a completion
    contains raises: a comparison that could not be made scores 0 and is counted in `failures`, by kind.

    Args:
        timeout: seconds for one comparison, without the worker's start.
        after: as in `ExactMatch`.

    Raises:
        ModuleNotFoundError: math-verify is not installed.
        ValueError: the timeout is not positive, or the marker is empty.
    """

    columns = ("answer",)

    def __init__(self, timeout: float = 5.0, after: str = "") -> None:
        _check_timeout("MathVerify", timeout)
        if importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError("MathVerify needs the package math-verify: pip install math-verify")
        self.timeout, self.after = timeout, after
        self.failures: Counter[str] = Counter()
        self._worker = Isolated("math_verify")

    def prepare(self) -> None:
        self._worker.start()

    def __call__(self, completion: str, example: Example) -> float:
        answer = _answer("MathVerify", example, self.after)
        guess = _tail(completion, self.after)
        if guess is None:
            return 0.0
        reply = self._worker.ask([answer, guess], self.timeout)
        if "failure" in reply:
            self.failures[reply["failure"]] += 1
        return float(reply.get("value", 0.0))


class ReasoningGymScore(Reward):
    """Score of the completion by reasoning-gym itself, in [0, 1]; partial marks are its own too.

    For examples that come from `reasoning_gym:TASK`, whose `task` and `metadata` it needs. Some of its scorers `eval`
    completions and rows: they run in a process of its own, which evaluates expressions and executes nothing, and which
    is killed when it is late (`Isolated`). A scorer that fails on a completion scores 0 and is counted in `failures`,
    by kind of error.

    Args:
        after: hand over only what follows the last occurrence of this marker; without it the score is 0.
        timeout: seconds for one completion, without the worker's start. Default 10: sympy simplifies for long.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
        ValueError: the timeout is not positive; a row names no task of reasoning-gym.
    """

    columns = ("task", "metadata")

    def __init__(self, after: str = "", timeout: float = 10.0) -> None:
        _check_timeout("ReasoningGymScore", timeout)
        if importlib.util.find_spec("reasoning_gym") is None:
            raise no_reasoning_gym("ReasoningGymScore")
        self.timeout, self.after = timeout, after
        self.failures: Counter[str] = Counter()
        self._worker = Isolated("reasoning_gym")

    def prepare(self) -> None:
        self._worker.start()

    def __call__(self, completion: str, example: Example) -> float:
        task = _column("ReasoningGymScore", "task", example)
        metadata = _column("ReasoningGymScore", "metadata", example)
        guess = _tail(completion, self.after)
        if guess is None:
            return 0.0
        entry = {
            "question": example.get("prompt"),
            "answer": example.get("answer"),
            "metadata": metadata if isinstance(metadata, str) else encode_metadata(metadata),
        }
        reply = self._worker.ask([task, guess.strip(), entry], self.timeout)
        if reply.get("failure") == "unknown task":
            raise ValueError(f"the column 'task' names {task!r}, which is no task of reasoning-gym")
        if "failure" in reply:
            self.failures[reply["failure"]] += 1
        return float(reply.get("value", 0.0))


class CallableReward(Reward):
    """Any plain function `f(completion: str, example: dict) -> float | None` as a reward.

    Args:
        function: its dotted path, such as "my_package.rewards.brevity".
        columns: the canonical columns that they read, so that their absence is found at the start.
        words: the dotted path of another function of the same arguments, whose answer in words is the feedback.

    Raises:
        ValueError: there is no such module or function, or it can't be called.
    """

    def __init__(self, function: str, columns: tuple[str, ...] = (), words: str | None = None) -> None:
        self.function = import_callable(function, "CallableReward.function")
        self.words = None if words is None else import_callable(words, "CallableReward.words")
        self.columns = tuple(columns)

    def __call__(self, completion: str, example: Example) -> float | None:
        answer: float | None = self.function(completion, example)
        return answer

    def feedback(self, completion: str, example: Example) -> str | None:
        answer: str | None = None if self.words is None else self.words(completion, example)
        return answer


def encode_metadata(metadata: Any) -> str:
    """Writes reasoning-gym metadata as text; `isolated_worker` reads it, and executes nothing in it.

    A Python literal rather than JSON, because some scorers (arc_agi, rearc) compare tuples with tuples, which
    JSON would turn into lists; JSON where the metadata holds other objects.
    """
    text = repr(metadata)
    try:
        literal_eval(text)
    except (ValueError, SyntaxError):
        return json.dumps(metadata, default=str)
    return text


def _check_timeout(who: str, timeout: float) -> None:
    if not 0 < timeout < math.inf:
        raise ValueError(f"{who}.timeout is {timeout} s; it must be greater than 0")


def _column(who: str, name: str, example: Example) -> Any:
    if example.get(name) is None:
        raise ValueError(f"{who} needs the column {name!r}; this example has {', '.join(map(str, example))}")
    return example[name]


def _answer(who: str, example: Example, marker: str = "") -> str:
    """Returns the example's answer; of a worked one, the text after its last marker."""
    answer = str(_column(who, "answer", example))
    tail = _tail(answer, marker)
    return answer if tail is None else tail


def _number(text: str) -> float | None:
    """Reads a text as a finite number, with a percent sign at its end in hundredths; None if it is none."""
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _tail(text: str, marker: str) -> str | None:
    """Returns the text after the last marker, or all of it for an empty marker; None where it is absent."""
    if not marker:
        return text
    _, separator, tail = text.rpartition(marker)
    return tail if separator else None
