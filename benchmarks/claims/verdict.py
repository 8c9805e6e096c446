"""Verdicts: rules over the numbers of all seeds, stated beside the numbers that they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

Numbers = Mapping[str, Sequence[float]]
"""By what was measured, a number for each seed."""


@dataclass(frozen=True)
class Rule:
    """A condition on the numbers of all seeds.

    Attributes:
        text: says the condition.
        names: of the numbers that it reads.
        holds: whether they fulfill it.
    """

    text: str
    names: tuple[str, ...]
    holds: Callable[[Numbers], bool]


def above(one: str, other: str) -> Rule:
    """Asks that every seed of one is above every seed of the other: of three and three, by chance one time in 20."""
    return Rule(f"“{one}” above “{other}”", (one, other), lambda n: min(n[one]) > max(n[other]))


def at_least(name: str, bound: float) -> Rule:
    """Asks that no seed is below a bound."""
    return Rule(f"“{name}” at least {bound:g}", (name,), lambda n: min(n[name]) >= bound)


def at_most(name: str, bound: float) -> Rule:
    """Asks that no seed is above a bound."""
    return Rule(f"“{name}” at most {bound:g}", (name,), lambda n: max(n[name]) <= bound)


def verdict(rules: Sequence[Rule], numbers: Numbers) -> str:
    """Says whether all rules are fulfilled, some, or none."""
    fulfilled = sum(rule.holds(numbers) for rule in rules)
    if fulfilled == len(rules):
        return "holds"
    return "holds in part" if fulfilled else "does not hold here"


def spread(values: Sequence[float]) -> str:
    """Formats a mean over seeds, with its deviation."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{short(mean(values))} ± {short(deviation)}"


def short(value: float) -> str:
    """Formats a number to three digits."""
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
