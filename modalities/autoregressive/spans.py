"""Spans: parts of a completion that somebody marks, as a channel of the steps that wrote them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...note import Note
from ...reward import Example
from ...trajectory import Trajectories


class Span(NamedTuple):
    """Part of a text: the characters start ≤ i < stop, and what they are, such as "a missed case"."""

    start: int
    stop: int
    label: str


class Annotator(ABC):
    """Marks what is decisive in a completion: the key steps of a right one, the errors of a wrong one."""

    columns: tuple[str, ...] = ()
    """Columns that it reads, of the data set or of earlier notes."""

    @abstractmethod
    def __call__(self, completion: str, example: Example, right: bool) -> list[Span]:
        """Returns the spans of a completion; empty where there is nothing to mark."""


class AgainstReference(Annotator):
    """Marks by rules: what a wrong completion has that a reference has not, and what matches a pattern in a right one.

    Texts are compared word by word.

    Args:
        reference: the column with a right solution; a row where it is empty has no errors marked.
        key: a regular expression of the key steps. Default: what is behind an equals sign, the sign included.
        error_label, key_label: what both are called.

    Raises:
        ValueError: the pattern is no regular expression.
    """

    def __init__(
        self,
        reference: str = "solution",
        key: str = r"=\s*\S+",
        error_label: str = "a wrong step",
        key_label: str = "a key step",
    ) -> None:
        try:
            self.key = re.compile(key)
        except re.error as error:
            raise ValueError(f"AgainstReference.key {key!r} is not a regular expression: {error}") from None
        self.reference, self.error_label, self.key_label = reference, error_label, key_label
        self.columns = (reference,)

    def __call__(self, completion: str, example: Example, right: bool) -> list[Span]:
        if right:
            return [Span(*match.span(), self.key_label) for match in self.key.finditer(completion)]
        words = list(re.finditer(r"\S+", completion))
        expected = str(example.get(self.reference) or "").split()
        if not expected:
            return []
        comparison = SequenceMatcher(None, expected, [word.group() for word in words], autojunk=False)
        return [
            Span(words[start].start(), words[stop - 1].end(), self.error_label)
            for what, _, _, start, stop in comparison.get_opcodes()
            if what != "equal" and stop > start
        ]


class Spans(Note):
    """Spans of a completion that an annotator marks (TRACE, 2605.10194).

    The channel ``spans`` ``[B, T]`` is 1 at the steps that wrote a marked character, 0 elsewhere. The column ``marked``
    has the different labels, with ``, `` between them; it is None where nothing is marked, as where a reward abstains.
    A teacher that is shown the label alone, and not the span, cannot give the solution away.

    Args:
        annotator: who marks: `AgainstReference`, or an `Annotator` of your own, such as one that asks a model.
        most: the largest share of a completion's trained steps; those beyond it, from the left, stay unmarked. Default
            0.25 (TRACE).
        threshold: a completion is right from this reward on. Default 0.5.

    Raises:
        ValueError: a share that is not in (0, 1]; when training begins: no rewards.
    """

    writes = ("marked",)
    channels = ("spans",)

    def __init__(self, annotator: Annotator, most: float = 0.25, threshold: float = 0.5) -> None:
        if not 0 < most <= 1:
            raise ValueError(f"Spans.most must be in (0, 1], got {most}")
        self.annotator, self.most, self.threshold = annotator, most, threshold
        self.columns = annotator.columns

    def check(self, module: Any) -> None:
        if not module.has_rewards:
            raise ValueError("Spans tells right from wrong by the reward, and there is none: set model.reward")

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        assert trajectories.reward is not None
        channel, labels = torch.zeros(trajectories.mask.shape, dtype=torch.float32), []
        texts, rewards = module.completions(trajectories), trajectories.reward.tolist()
        for i, (text, row, reward) in enumerate(zip(texts, trajectories.examples, rewards, strict=True)):
            spans = [] if reward != reward else self.annotator(text, row, reward >= self.threshold)
            trained = trajectories.mask[i].nonzero().squeeze(-1)
            marked = steps_of(spans, trajectories.actions[i, trained].tolist(), module.written_as)
            chosen = trained[marked[: int(self.most * len(trained))]]
            channel[i, chosen] = 1.0
            labels.append(", ".join(dict.fromkeys(span.label for span in spans)) or None if len(chosen) else None)
        noted = trajectories.noted({"marked": labels})
        noted.channels = {**trajectories.channels, "spans": channel}
        return noted


def steps_of(spans: Iterable[Span], tokens: list[int], decode: Callable[[list[int]], str]) -> Tensor:
    """Returns the places ``[n]`` of the tokens that write a character of some span, in order."""

    def length(count: int) -> int:
        return len(decode(tokens[:count]))

    counts = range(len(tokens) + 1)
    marked: set[int] = set()
    for start, stop, _ in spans:
        # the first token behind which the text is longer than the start, and the first with which it reaches the stop
        first, last = bisect_right(counts, start, key=length) - 1, bisect_left(counts, stop, key=length)
        marked.update(range(first, min(last, len(tokens))))
    return torch.tensor(sorted(marked), dtype=torch.long)
