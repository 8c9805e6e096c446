"""Rewards of images: functions of a picture and its example."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...finite import check_finite
from ...reward import Reward
from ...trajectory import Example


class Brightness(Reward):
    """Reward of 1 if the mean of the image's pixels, in [0, 1], reaches a threshold, else 0.

    Args:
        at_least: the threshold. Default 0.5; digits are white on black.
    """

    def __init__(self, at_least: float = 0.5) -> None:
        check_finite("Brightness.at_least", at_least)
        self.at_least = at_least

    def __call__(self, completion: Any, example: Example) -> float:  # type: ignore[override]
        return float(np.asarray(completion, dtype=np.float32).mean() / 255 >= self.at_least)


class ClipScore(Reward):
    """Cosine between CLIP's embeddings of the image and of its prompt, at least 0 (2104.08718, without its factor).

    Args:
        model: a folder or hub name of a CLIP model with its processor.
    """

    columns = ("prompt",)

    def __init__(self, model: str = "openai/clip-vit-base-patch16") -> None:
        from transformers import AutoProcessor, CLIPModel

        self.model = model
        self._clip = CLIPModel.from_pretrained(model).eval()
        self._processor = AutoProcessor.from_pretrained(model)

    @torch.no_grad()
    def __call__(self, completion: Any, example: Example) -> float:  # type: ignore[override]
        inputs = self._processor(
            text=[example["prompt"]], images=[completion], return_tensors="pt", padding=True, truncation=True
        )
        outputs = self._clip(**inputs)
        return max(0.0, float(torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds)))
