"""Finding: one line of the verdict of `opd check`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from .printable import cell

Verdict = Literal["good", "doubtful", "bad", "told"]
MARKS = {"good": ("✓", "green"), "doubtful": ("!", "yellow"), "bad": ("✗", "bold red"), "told": ("·", "")}


@dataclass(frozen=True)
class Finding:
    """Finding about a run before its first step.

    Attributes:
        name: what was looked at.
        verdict: "good"; "doubtful", it runs and may disappoint; "bad", it does not run or does not learn; "told", a
            number without a judgment.
        text: what was found.
        advice: what to do about it; empty where nothing is to be done.
        details: further lines with a name each, for a table of its own.
    """

    name: str
    verdict: Verdict
    text: str
    advice: str = ""
    details: list[tuple[str, str]] = field(default_factory=list)


def show(findings: Sequence[Finding], console: Console) -> None:
    """Prints the details of findings as tables, and then a line for each."""
    for finding in findings:
        if finding.details:
            table = Table(title=cell(finding.name), title_justify="left", show_header=False)
            table.add_column()
            table.add_column(overflow="fold")
            for name, text in finding.details:
                table.add_row(cell(name), cell(text))
            console.print(table)
    lines = Table.grid(padding=(0, 1))
    for _ in range(2):
        lines.add_column(no_wrap=True)
    lines.add_column(overflow="fold")
    for finding in findings:
        mark, style = MARKS[finding.verdict]
        text = f"{finding.text}\n→ {finding.advice}" if finding.advice else finding.text
        lines.add_row(cell(mark, style), cell(finding.name, style), cell(text))
    console.print(lines)


def summary(findings: Sequence[Finding]) -> str:
    """Sums the verdicts up in a sentence."""
    bad, doubtful = (sum(finding.verdict == kind for finding in findings) for kind in ("bad", "doubtful"))
    if bad:
        return f"red: {bad} of {len(findings)} findings keep it from running or learning"
    return f"green, with {doubtful} doubt{'s' * (doubtful > 1)}" if doubtful else "green"


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Converts findings for programs."""
    return {
        "verdict": "bad" if any(finding.verdict == "bad" for finding in findings) else "good",
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
