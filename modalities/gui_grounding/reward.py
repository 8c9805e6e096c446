"""Rewards of GUI grounding, read from the metrics of every prediction (`metrics.grounding_metrics`)."""

from __future__ import annotations

from ...reward import Example, Reward
from .metrics import center


class PointInBox(Reward):
    """Reward of 1 if the predicted point, or the center of the predicted box, lies in the target, else 0."""

    columns = ("image", "box")

    def __call__(self, completion: str, example: Example) -> float:
        return float(example["metrics"]["point_in_box"])

    def feedback(self, completion: str, example: Example) -> str | None:
        """Says on which side the target was missed; None where it was not."""
        if example["prediction"] is None:
            return "This names no place."
        (x, y), (left, top, right, bottom) = center(example["prediction"]), example["box"]
        sides = {"left": x < left, "right": x > right, "high": y < top, "low": y > bottom}
        missed = [
            f"too far {side}" if side in ("left", "right") else f"too {side}" for side, is_so in sides.items() if is_so
        ]
        return f"This is {' and '.join(missed)}." if missed else None


class Overlap(Reward):
    """Intersection over union of the predicted box with the target; 0 for points and malformed answers."""

    columns = ("image", "box")

    def __call__(self, completion: str, example: Example) -> float:
        return float(example["metrics"].get("iou", 0.0))
