"""Metrics of predicted places.

Predictions are points ``(x, y)`` or boxes ``(x1, y1, x2, y2)`` in pixels of the original image, None where an answer
was malformed; targets are boxes; sizes are (width, height).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Prediction = Sequence[float] | None
Box = Sequence[float]


def center(place: Sequence[float]) -> tuple[float, float]:
    """Returns a point itself, or the center of a box."""
    return (place[0] + place[-2]) / 2, (place[1] + place[-1]) / 2


def point_in_box(prediction: Prediction, box: Box) -> bool:
    """Tells whether a point, or a predicted box's center, is in the target, edges included (as in ScreenSpot-Pro)."""
    if prediction is None:
        return False
    x, y = center(prediction)
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def iou(prediction: Box, box: Box) -> float:
    """Computes the intersection over union of two boxes, in [0, 1]."""
    width = min(prediction[2], box[2]) - max(prediction[0], box[0])
    height = min(prediction[3], box[3]) - max(prediction[1], box[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (_area(prediction) + _area(box) - shared)


def distance(prediction: Sequence[float], box: Box, size: tuple[int, int]) -> float:
    """Computes the distance of the centers, as a share of the image's diagonal: at most 1 for places on the screen."""
    return math.dist(center(prediction), center(box)) / math.hypot(*size)


def grounding_metrics(prediction: Prediction, box: Box, size: tuple[int, int]) -> dict[str, float]:
    """Computes all metrics of one prediction.

    Returns:
        ``parsed`` and ``point_in_box``, 0 or 1; where it is well-formed ``distance``; where it is a box ``iou``. A mean
        of the last two is over the answers that have them: look at ``parsed`` beside it.
    """
    if prediction is None:
        return {"parsed": 0.0, "point_in_box": 0.0}
    metrics = {
        "parsed": 1.0,
        "point_in_box": float(point_in_box(prediction, box)),
        "distance": distance(prediction, box, size),
    }
    return metrics | ({"iou": iou(prediction, box)} if len(prediction) == 4 else {})


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
