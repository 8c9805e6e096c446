from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.modalities.vision_language.boxes import problem_with_box

SIZE = (200, 100)


@given(st.lists(st.floats(0, 200), min_size=2, max_size=2), st.lists(st.floats(0, 100), min_size=2, max_size=2))
def test_a_box_with_an_area_inside_the_image_is_right(xs: list[float], ys: list[float]) -> None:
    (x1, x2), (y1, y2) = sorted(xs), sorted(ys)
    reason = problem_with_box([x1, y1, x2, y2], SIZE)
    if x1 == x2 or y1 == y2:
        assert reason is not None
    elif max(x2, y2) > 1:
        assert reason is None


@pytest.mark.parametrize("box", [[0, 0, 200, 100], (3, 4, 5, 6), [-0.4, -1, 200.6, 101], [0, 0, 1, 2]])
def test_edges_are_exclusive_and_rounding_is_forgiven(box: Any) -> None:
    assert problem_with_box(box, SIZE) is None


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        (None, "is not four finite numbers"),
        ("1,2,3,4", "is not four finite numbers"),
        ([1, 2, 3], "is not four finite numbers"),
        ([1, 2, 3, "4"], "is not four finite numbers"),
        ([1, 2, 3, math.nan], "is not four finite numbers"),
        ([1, 2, math.inf, 4], "is not four finite numbers"),
        ([True, 2, 3, 4], "is not four finite numbers"),
        ([0.1, 0.2, 0.5, 0.6], "looks normalized to 0…1: .* multiply by 200 and 100"),
        ([0, 0, 1, 1], "looks normalized"),
        ([10, 10, 10, 20], "has no area"),
        ([120, 50, 30, 20], r"looks like \[x, y, width, height\]"),
        ([120, 50, 119, 0], "has no area"),
        ([190, 50, 100, 20], "has no area"),
        ([10, 10, 201.5, 20], r"is out of the image: .* in 200 × 100 pixels; is it in thousandths"),
        ([10, 10, 2000, 20], r"is out of the image: .* in 200 × 100 pixels$"),
        ([-0.9, 10, -0.1, 20], "is out of the image"),
        ([200, 10, 200.5, 20], "is out of the image"),
        ([-5, 10, 20, 20], r"is out of the image: .* in 200 × 100 pixels$"),
    ],
)
def test_what_is_wrong_is_said(box: Any, reason: str) -> None:
    found = problem_with_box(box, SIZE)
    assert found is not None
    assert re.search(reason, found)
