"""GradientGuard: every trained parameter has a gradient before an optimizer step, and a finite one."""

from __future__ import annotations

from typing import Literal

import lightning as L
import torch

from .metrics import Metrics
from .sharding import unsharded
from .streams import Streams


class GradientGuard(L.Callback):
    """Checks the gradient before each optimizer step; every module brings one.

    Args:
        streams: of the run, whose student has to have a gradient.
        on_nonfinite: "stop" with an error, or "skip" the optimizer step.
        metrics: where the learning rate, the gradient's norm before it is clipped and ``skipped_steps`` are recorded.

    Raises:
        RuntimeError: a trained parameter has no gradient.
        FloatingPointError: the gradient is not finite, and steps are not skipped.
    """

    def __init__(self, streams: Streams, on_nonfinite: Literal["stop", "skip"], metrics: Metrics) -> None:
        self.streams, self.on_nonfinite, self.metrics = streams, on_nonfinite, metrics

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        student = self.streams.policies["student"].model
        missing = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
        if missing:
            raise RuntimeError(
                f"{len(missing)} trainable parameters got no gradient, among them {missing[0]}; they would not learn. "
                "Name what the loss does not reach in student.freeze. (4-bit bases lose the gradients of their "
                "adapters on some CPUs after a forward pass in eval mode.)"
            )
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # of slices a collective call: every rank comes to the same number
        norm = unsharded(torch.nn.utils.get_total_norm(gradients))
        bad = not bool(norm.isfinite())
        self.metrics.record("lr", float(optimizer.param_groups[0]["lr"]))
        if not bad:
            self.metrics.record("gradient_norm", norm)
        if self.on_nonfinite == "skip":
            self.metrics.record("skipped_steps", float(bad))
            if bad:
                optimizer.zero_grad(set_to_none=True)  # an optimizer does not touch what has no gradient
        elif bad:
            raise FloatingPointError(
                f"the gradient of optimizer step {trainer.global_step + 1} is not finite; the last checkpoint is from "
                "before it. A lower learning rate, trainer.gradient_clip_val or float32 may help; model.on_nonfinite: "
                "skip leaves such steps out"
            )
