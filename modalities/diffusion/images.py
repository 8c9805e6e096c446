"""Pictures: making them of tensors, showing them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...images import open_image

opened = open_image
"""Reader of a row's image, as in every setting."""


def picture(image: Tensor) -> Image.Image:
    """Converts ``[3, H, W]`` in [0, 1] to a picture, as diffusers does."""
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def contact_sheet(images: Tensor, columns: int = 10, scale: int = 3) -> Image.Image:
    """Joins ``[n, 3, H, W]`` in [0, 1] to one picture."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * (height + 1), columns * (width + 1))
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + 1), (i % columns) * (width + 1)
        sheet[:, y : y + height, x : x + width] = image
    pixels = (sheet.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels)
    larger = max(1, scale if max(picture.size) < 600 else 1)
    return picture.resize((larger * picture.width, larger * picture.height), Image.Resampling.NEAREST)


def log_image(logger: Any, name: str, image: Image.Image, step: int) -> None:
    """Hands a picture to a logger that takes pictures (W&B, MLflow, TensorBoard)."""
    if hasattr(logger, "log_image"):
        logger.log_image(name, [image], step=step)
    elif hasattr(getattr(logger, "experiment", None), "add_image"):
        logger.experiment.add_image(name, np.asarray(image), step, dataformats="HWC")
