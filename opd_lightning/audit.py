"""The start-up audit: one table of what each role is, and a refusal of what cannot work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from .printable import cell

if TYPE_CHECKING:
    from .module import OnPolicyDistillation


ROWS_OF = {"fit": "train", "validate": "validation", "test": "test", "predict": "predict"}


def audit(module: OnPolicyDistillation) -> None:
    """Prints what each role is, and what is made of the first row; `audit_rows` raises what cannot work."""
    rows = module.audit_rows()
    if rows:
        _show(list(module.policies), rows)
    _show_first_row(module)


@rank_zero_only
def _show_first_row(module: OnPolicyDistillation) -> None:
    trainer = module._trainer
    split = ROWS_OF.get(str(trainer.state.fn and trainer.state.fn.value), "") if trainer is not None else ""
    examples = getattr(getattr(trainer, "datamodule", None), split or "train", None)
    if not examples or not (readings := module.readings(dict(examples[0]))):
        return
    table = Table(title=f"the first row of data.{split}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for who, what in readings:
        table.add_row(cell(who), cell(what))
    Console().print(table)


def _show(roles: list[str], rows: list[tuple[str, dict[str, str]]]) -> None:
    show("audit", roles, rows)


@rank_zero_only
def show(title: str, roles: list[str], rows: list[tuple[str, dict[str, str]]]) -> None:
    """Prints a table with a column for each role."""
    table = Table(title=title, title_justify="left")
    for heading in ("", *roles):
        table.add_column(cell(heading), overflow="fold")
    for what, values in rows:
        table.add_row(cell(what), *(cell(values.get(role, "")) for role in roles))
    Console().print(table)
