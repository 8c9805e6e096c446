"""Views of single papers: what a teacher is shown."""

from __future__ import annotations

from ..policy import View
from ..trajectory import Example


class Exposed(View):
    """View with the first share of a column alone (ATESD, 2605.11458), such as of a solution, by characters.

    The share is a knob, ``teachers.<name>.view.share``. ATESD learns it while it trains; 0.5 is its best fixed one.

    Args:
        view: what is shown, written from the columns as they are then. ATESD's has the final answer at every share.
        share: α in [0, 1]. Default 0.5; 1 is the view itself.
        column: whose text is cut. Default ``solution``.

    Raises:
        ValueError: a share out of range.
    """

    def __init__(self, view: View, share: float = 0.5, column: str = "solution") -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"Exposed.share must be in [0, 1], got {share}")
        self.view, self.share, self.column = view, share, column
        self.columns = tuple(sorted({*view.columns, column}))

    def __call__(self, example: Example) -> Example | None:
        text = example.get(self.column)
        if not isinstance(text, str):
            return None
        # the template leaves out a row whose column is empty; one that is cut to nothing is none
        return self.view({**example, self.column: text[: int(self.share * len(text) + 1e-9)] or " "})
