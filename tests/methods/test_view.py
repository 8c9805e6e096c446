"""Views of single papers: what of an example is shown."""

from __future__ import annotations

import pytest

from opd_lightning.methods.view import Exposed
from opd_lightning.modalities.autoregressive import PromptView

ROW = {"prompt": "1+1=", "solution": "0123456789", "answer": "2"}
INNER = PromptView("{{ solution }}#{{ answer }}?{{ prompt }}")


@pytest.mark.parametrize(("share", "shown"), [(0.0, " "), (0.5, "01234"), (0.3, "012"), (1.0, "0123456789")])
def test_the_first_share_and_the_answer_are_shown(share, shown):
    assert Exposed(INNER, share)(ROW)["prompt"] == f"{shown}#2?1+1="


def test_all_of_it_is_the_view_itself_and_nothing_is_no_view():
    assert Exposed(INNER, 1.0)(ROW)["prompt"] == INNER(ROW)["prompt"]
    assert Exposed(INNER)({**ROW, "solution": None}) is None
    assert Exposed(INNER)({**ROW, "answer": ""}) is None
    assert Exposed(INNER).columns == ("answer", "prompt", "solution")
    assert ROW["solution"] == "0123456789", "the row stays as it is"
    with pytest.raises(ValueError, match=r"Exposed\.share must be in \[0, 1\], got 2"):
        Exposed(INNER, 2)
