"""LiveBytes: the bytes that a pass through a model keeps and needs, counted tensor by tensor."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Taken(NamedTuple):
    """Bytes that a pass takes besides weights and their gradients.

    Attributes:
        kept: after the forward pass.
        forward: the most while it ran.
        backward: the most in the backward pass; without one, what was kept.
    """

    kept: float
    forward: float
    backward: float


NOTHING = Taken(0, 0, 0)


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of tensors made within it that are alive, and of the most there were."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for storage in [x.untyped_storage() for x in tree_leaves(results) if isinstance(x, Tensor)]:
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return results

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def taken(
    model: nn.Module,
    run: Callable[[], Tensor],
    backward: bool,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Taken:
    """Counts what a pass takes, which is made: a real one, in which each gradient of a weight is forgotten at once.

    Args:
        model: whose weights are none of the pass's; there must be no gradients yet.
        run: makes the forward pass.
        backward: whether it is one that trains, in training mode, with its backward pass.
        context: in which a forward pass runs, such as autocast.
    """
    weights, was_training = [*model.parameters(), *model.buffers()], model.training
    hooks = [w.register_post_accumulate_grad_hook(_forget) for w in model.parameters() if backward and w.requires_grad]
    try:
        with LiveBytes(weights) as live, torch.set_grad_enabled(backward):
            model.train(backward)
            with context():
                out = run()
            kept, forward, live.peak = live.now, live.peak, live.now
            if backward:
                out.backward(torch.ones_like(out))
            return Taken(kept, forward, live.peak)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


def _forget(weight: Tensor) -> None:
    weight.grad = None
