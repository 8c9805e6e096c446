"""Rewards of GUI grounding, read from the metrics of every prediction (`metrics.grounding_metrics`)."""

from __future__ import annotations

from ...reward import Example, Reward


class PointInBox(Reward):
    """Reward of 1 if the predicted point, or the center of the predicted box, lies in the target, else 0."""

    columns = ("image", "box")

    def __call__(self, completion: str, example: Example) -> float:
        return float(example["metrics"]["point_in_box"])


class Overlap(Reward):
    """Intersection over union of the predicted box with the target; 0 for points and malformed answers."""

    columns = ("image", "box")

    def __call__(self, completion: str, example: Example) -> float:
        return float(example["metrics"].get("iou", 0.0))
