"""Checklist: a judge by rules, which says in words what a completion lacks."""

from __future__ import annotations

from ...reward import Example, Reward


class Checklist(Reward):
    """Reward of 1 if a completion passes every check, else 0, with words on those that it fails.

    A judge by rules, for the note `Feedback`: what the answer, its steps or its place lack.

    Args:
        checks: rewards, by what is said where one is below ``threshold``, such as
            ``{"The answer is wrong.": {class_path: ExactMatch}}``. It abstains where one of them does.
        threshold: default 0.5 (SDPO, 2601.20802).

    Raises:
        ValueError: nothing to check.
    """

    def __init__(self, checks: dict[str, Reward], threshold: float = 0.5) -> None:
        if not checks:
            raise ValueError("Checklist.checks is empty; name at least one reward, by the words for those who fail it")
        self.checks, self.threshold = checks, threshold
        self.columns = tuple(dict.fromkeys(column for check in checks.values() for column in check.columns))

    def prepare(self) -> None:
        for check in self.checks.values():
            if hasattr(check, "prepare"):
                check.prepare()

    def __call__(self, completion: str, example: Example) -> float | None:
        values = [check(completion, example) for check in self.checks.values()]
        known = [value for value in values if value is not None]
        return float(min(known) >= self.threshold) if len(known) == len(values) else None

    def feedback(self, completion: str, example: Example) -> str | None:
        values = [check(completion, example) for check in self.checks.values()]
        failed = [value is not None and value < self.threshold for value in values]
        return " ".join(words for words, lacks in zip(self.checks, failed, strict=True) if lacks) or None
