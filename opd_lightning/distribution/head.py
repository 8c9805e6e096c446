"""Head: from hidden states to logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# In place of −inf: 0 × (−1e30 − −1e30) is 0 where 0 × (−inf − −inf) is NaN, and exp(−1e30) is 0 all the same.
IMPOSSIBLE = -1e30


@dataclass(frozen=True)
class Head:
    """From hidden states ``[n, H]`` to float32 logits ``[n, vocabulary]``.

    Attributes:
        module: the projection; a plain `nn.Linear` takes the fast path, anything else (LoRA, quantized) autograd.
        vocabulary: ids at or above it are padding of the matrix and are cut off.
        scale: factor on the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        softcap: c in c·tanh(logits / c) (Gemma-2), or None.
        suppressed: ``[k]`` ids that can never be an action (image placeholders, …), or None.
        context: entered around every projection; teachers that share the student's head switch adapters here.
    """

    module: nn.Module
    vocabulary: int
    scale: float = 1.0
    softcap: float | None = None
    suppressed: Tensor | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def is_linear(self) -> bool:
        return type(self.module) is nn.Linear

    @property
    def is_plain(self) -> bool:
        """True where the raw logits of a linear head are the logits: no scale, no cap."""
        return self.is_linear and self.scale == 1.0 and self.softcap is None

    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def project(self, hidden: Tensor) -> Tensor:
        """Returns the raw logits ``[n, vocabulary]`` in the compute dtype."""
        if self.is_linear:
            weight, bias = self.linear(compute_dtype(hidden))
            return F.linear(hidden.to(weight.dtype), weight, bias)
        with self.context():
            return self.module(hidden)[..., : self.vocabulary]

    def linear(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        """Returns weight ``[vocabulary, H]`` and bias of a plain head in ``dtype``; None: as they are stored."""
        module: Any = self.module
        weight = module.weight[: self.vocabulary]
        bias = None if module.bias is None else module.bias[: self.vocabulary]
        if dtype is None:
            return weight, bias
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def finish(self, raw: Tensor) -> Tensor:
        """Scales, caps and suppresses raw logits, in float32 (float64 stays)."""
        logits = wide(raw)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.suppressed is not None:
            logits = logits.index_fill(-1, self.suppressed.to(logits.device), IMPOSSIBLE)
        return logits

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.finish(self.project(hidden))


def wide(tensor: Tensor) -> Tensor:
    """Casts to float32; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def compute_dtype(hidden: Tensor) -> torch.dtype | None:
    """Returns the dtype of autocast on the hidden states' device; None where it is off."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
