"""The start-up audit: one table of what each role is, and a refusal of what cannot work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from .printable import cell

if TYPE_CHECKING:
    from .module import OnPolicyDistillation


def audit(module: OnPolicyDistillation) -> None:
    """Prints what each role is; a setting's `audit_rows` raises what cannot work."""
    rows = module.audit_rows()
    if rows:
        _show(list(module.policies), rows)


@rank_zero_only
def _show(roles: list[str], rows: list[tuple[str, dict[str, str]]]) -> None:
    table = Table(title="audit", title_justify="left")
    for heading in ("", *roles):
        table.add_column(cell(heading), overflow="fold")
    for what, values in rows:
        table.add_row(cell(what), *(cell(values.get(role, "")) for role in roles))
    Console().print(table)
