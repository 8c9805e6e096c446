"""The start-up audit: one table of what each role is, and a refusal of what cannot work."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from rich.table import Table

from .note import written_by
from .printable import cell
from .setting import Setting
from .splits import rows_of
from .trajectory import Example

SPLIT_OF = {"fit": "train", "validate": "validation", "test": "test", "predict": "predict"}


def audit(setting: Setting, trainer: Any) -> None:
    """Prints what each role is, and what is made of the first row; `audit_rows` raises what cannot work."""
    show("audit", list(setting.policies), setting.audit_rows())
    facts = dict.fromkeys(fact for told in setting.elsewhere.values() for fact in told)
    rows = [(fact, {name: told.get(fact, "") for name, told in setting.elsewhere.items()}) for fact in facts]
    show("teachers elsewhere", list(setting.elsewhere), rows)
    if trainer is not None:
        _show_first_row(setting, trainer)


@rank_zero_only
def _show_first_row(setting: Setting, trainer: Any) -> None:
    """Prints what is made of the first row of the split that is used."""
    split = SPLIT_OF.get(str(trainer.state.fn and trainer.state.fn.value), "train")
    examples = rows_of(trainer, split, "the table of what is made of the first row")
    if not examples:
        return
    warn_of_idle_views(setting, dict(examples[0]))
    if not (readings := setting.readings(dict(examples[0]))):
        return
    table = Table(title=f"the first row of data.{split}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for who, what in readings:
        table.add_row(cell(who), cell(what))
    Console().print(table)


def warn_of_idle_views(setting: Setting, example: Example) -> None:
    """Warns of teachers whose view shows a row as the student sees it, such as a template that ignores its columns."""
    for name, teacher in setting.teachers.items():
        if shows_nothing_more(setting, name, example):
            rank_zero_warn(
                f"model.teachers.{name}.view: {type(teacher.view).__name__} shows the first row as the student sees "
                "it: the teacher knows nothing more. Does its template name the column that it is to show?"
            )


def shows_nothing_more(setting: Setting, name: str, example: Example) -> bool:
    """Tells whether a teacher has a view, and it shows a row as the student sees it."""
    teacher, (own,) = setting.teachers[name], setting.shown([example])
    # what a view makes of notes is not known before there are any
    waits = teacher.view is not None and not written_by(setting.notes).isdisjoint(teacher.view.columns)
    view = None if teacher.view is None or waits else teacher.look(example)
    return view is not None and all(_equal(value, own.get(column)) for column, value in view.items())


def _equal(one: Any, other: Any) -> bool:
    """Compares plain values; of others, which may be large or say nothing of equality, only the same one is equal."""
    return one is other or (isinstance(one, str | int | float | list | dict) and bool(one == other))


@rank_zero_only
def show(title: str, roles: list[str], rows: list[tuple[str, dict[str, str]]]) -> None:
    """Prints a table with a column for each role; nothing without rows."""
    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for heading in ("", *roles):
        table.add_column(cell(heading), overflow="fold")
    for what, values in rows:
        table.add_row(cell(what), *(cell(values.get(role, "")) for role in roles))
    Console().print(table)
