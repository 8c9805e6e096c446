"""Optimizers of the student, and the schedules of their learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import get_scheduler

from .finite import Finite


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """Builds AdamW: learning rate 1e-5, no weight decay."""
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)


def in_place(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Sets ``fused`` on torch's Adam and AdamW, which spares temporaries, unless ``foreach`` or ``fused`` is set.

    What torch chooses by itself makes two tensors as large as the largest weight, on a GPU as large as all of them.
    """
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        for group in optimizer.param_groups:
            everywhere = all(parameter.device.type in ("cpu", "cuda") for parameter in group["params"])
            if everywhere and group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
                # as an argument of the constructor it would make Lightning refuse to clip in mixed precision
                group["fused"] = True
    return optimizer


@dataclass
class LRSchedule:
    """The learning rate over optimizer steps.

    Args:
        name: of transformers' schedules; ``linear`` and ``cosine`` fall to 0 at trainer.max_steps.
        warmup_steps: linear rise from 0.
    """

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0

    __setattr__ = Finite.__setattr__

    def of(self, optimizer: torch.optim.Optimizer, max_steps: int) -> Any:
        """Makes torch's scheduler of an optimizer; ``max_steps`` < 1: nobody knows when training ends.

        Raises:
            ValueError: the schedule must know.
        """
        name: str = self.name
        if name != "constant" and max_steps < 1:
            raise ValueError(f"model.schedule.name={name} needs trainer.max_steps")
        if name == "constant" and self.warmup_steps:
            name = "constant_with_warmup"  # transformers' "constant" has none
        # −1: no limit; a constant rate does not read it
        return get_scheduler(name, optimizer, self.warmup_steps, max(max_steps, 1))
