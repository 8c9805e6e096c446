from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_lightning.modalities.gui_grounding.metrics import distance, grounding_metrics, iou, point_in_box
from opd_lightning.modalities.gui_grounding.reward import PointInBox

SIZE = (40, 30)
BOX = (10, 5, 20, 15)


@st.composite
def boxes(draw):
    (x1, x2), (y1, y2) = (
        sorted(draw(st.lists(st.integers(0, length), min_size=2, max_size=2, unique=True))) for length in SIZE
    )
    return x1, y1, x2, y2


def pixels(box):
    picture = np.zeros(SIZE[::-1], bool)
    picture[box[1] : box[3], box[0] : box[2]] = True
    return picture


@given(boxes(), boxes())
def test_iou_is_that_of_the_pixels(one, other):
    shared, either = (pixels(one) & pixels(other)).sum(), (pixels(one) | pixels(other)).sum()
    assert iou(one, other) == pytest.approx(shared / either)
    assert iou(one, other) == iou(other, one)


@pytest.mark.parametrize(
    ("prediction", "inside"),
    [
        ((15, 10), True),
        ((10, 5), True),
        ((20, 15), True),
        ((9.9, 10), False),
        ((15, 15.1), False),
        ((0, 0, 30, 20), True),
        ((0, 0, 18, 20), False),
        (None, False),
    ],
)
def test_a_box_counts_by_its_center_and_edges_belong_to_the_target(prediction, inside):
    assert point_in_box(prediction, BOX) is inside


@given(boxes(), boxes())
def test_distance_is_between_centers_and_at_most_one_on_the_screen(one, other):
    centers = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in (one, other)]
    assert distance(one, other, SIZE) == distance(centers[0], other, SIZE)
    assert distance(one, other, SIZE) == pytest.approx(math.dist(*centers) / 50)
    assert 0 <= distance(one, other, SIZE) < 1


def test_a_grade_has_what_the_prediction_allows():
    assert grounding_metrics(None, BOX, SIZE) == {"parsed": 0, "point_in_box": 0}
    assert grounding_metrics((15, 10), BOX, SIZE) == {"parsed": 1, "point_in_box": 1, "distance": 0}
    assert grounding_metrics((0, 5, 10, 15), BOX, SIZE) == {"parsed": 1, "point_in_box": 0, "distance": 0.2, "iou": 0}


@pytest.mark.parametrize(
    ("prediction", "words"),
    [
        ((15, 10), None),
        ((20, 5), None),
        ((9, 10), "This is too far left."),
        ((21, 16), "This is too far right and too low."),
        ((12, 0, 14, 4), "This is too high."),
        (None, "This names no place."),
    ],
)
def test_a_click_beside_the_target_is_told_on_which_side(prediction, words):
    assert PointInBox().feedback("", {"prediction": prediction, "box": list(BOX)}) == words
