"""Views of prompts for images."""

from __future__ import annotations

from ...policy import View
from ...trajectory import Example

REFERENCE = "reference"


class ReferenceImage(View):
    """View with a reference image for the teacher, through the model's own encoder.

    In D-OPSD (2605.05204) it is the picture that the prompt should give. It never becomes a latent. A row without one
    has no view.

    Args:
        column: which one holds the image. Default ``image``.
    """

    def __init__(self, column: str = "image") -> None:
        self.column = column
        self.columns = (column,)

    def __call__(self, example: Example) -> Example | None:
        image = example.get(self.column)
        return None if image is None else {**example, REFERENCE: image}


class DetailedPrompt(View):
    """View with another, longer prompt for the teacher.

    Args:
        column: which one holds it. Default ``caption``.
    """

    def __init__(self, column: str = "caption") -> None:
        self.column = column
        self.columns = (column,)

    def __call__(self, example: Example) -> Example | None:
        caption = example.get(self.column)
        return {**example, "prompt": caption} if caption else None
