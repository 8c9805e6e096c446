"""Floating-point operations of models that write tokens, as model FLOP utilization counts them: those that are needed.

A row of which n tokens are read, behind b that were read before, takes

    2 · W · n + 4 · A · n · (b + n)

in the forward pass of a body, with W weights in the matrices of its layers, and A the width of its attention (heads ×
size of a head, summed over layers); a token counts as if it attended to its whole row. A backward pass takes the same
once more for the gradients of activations, and once more for those of the weights that are trained. The head takes
2 · V · H for each trained step, V ids of H numbers, and its backward pass as above. Padding, what checkpointing
computes again, the eyes of models that see, and everything that is no product do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...diagnostics import Stopwatch
from ...metrics import Metrics
from ...policy import Policy
from ...trajectory import Trajectories
from .memory import Shape
from .models import bare, output_embeddings
from .prefix import Prefix, read_once


@dataclass(frozen=True)
class Operations:
    """Weights that a policy's tokens are multiplied with.

    Attributes:
        trained, frozen: in the matrices of layers, adapters included.
        attention: width, summed over layers.
        head: weights of the head.
        trains_head: whether the head is trained.
    """

    trained: int
    frozen: int
    attention: int
    head: int
    trains_head: bool

    @classmethod
    def of(cls, policy: Policy) -> Operations | None:
        """Counts the weights of a policy; None for layers with experts, convolutions or no heads."""
        model = bare(policy.model)
        decoder, head = model.get_decoder(), output_embeddings(policy)
        heads = getattr(model.config.get_text_config(), "num_attention_heads", None)  # some have a list, by layer
        if not isinstance(heads, int) or any(weight.ndim > 2 for weight in decoder.parameters()):
            return None
        sums = {True: 0, False: 0}
        for name, module in decoder.named_modules():
            # a teacher that shares the student's model speaks without what the student learns, as good as always
            if isinstance(module, nn.Linear | Conv1D) and (policy.name == "student" or ".lora_" not in name):
                sums[module.weight.requires_grad] += _size(module)
        shape = Shape.of(model.config)
        width = shape.layers * shape.heads * shape.size
        return cls(sums[True], sums[False], width, _size(head), head.weight.requires_grad)

    def body(self, tokens: int, pairs: int, backward: bool) -> float:
        """Counts operations of reading tokens, which attend to ``pairs`` of them in all."""
        weights = 3 * self.trained + 2 * self.frozen if backward else self.trained + self.frozen
        return 2.0 * weights * tokens + 4.0 * self.attention * pairs * (3 if backward else 1)

    def of_head(self, steps: int, backward: bool) -> float:
        """Counts operations of the head at steps."""
        return 2.0 * self.head * steps * (2 + self.trains_head if backward else 1)


def _size(module: Any) -> int:
    """Counts the weights of a matrix, also where it is packed into fewer numbers."""
    return module.in_features * module.out_features if isinstance(module, nn.Linear) else module.weight.numel()


class Counter:
    """Counter of what a policy's passes take, for a run's stopwatch; nothing is computed for each token.

    Args:
        stopwatch: of the run.
        operations: of the policy; None: they are not known, and padding alone is counted.
        part: student or teacher.
    """

    def __init__(self, stopwatch: Stopwatch, operations: Operations | None, part: str) -> None:
        self._stopwatch, self._operations, self._part = stopwatch, operations, part
        self._backward = part == "student" and torch.is_grad_enabled()

    def passes(
        self, length: Tensor, prefix: Prefix, passes: Iterator[tuple[Tensor, int, Tensor]]
    ) -> Iterator[tuple[Tensor, int, Tensor]]:
        """Counts forward passes as they come, and what is read once before them.

        Args:
            length: ``[B]`` tokens of rows, on the CPU.
            prefix: what they share.
            passes: rows, first column and hidden states ``[n, W, H]`` of each.
        """
        for start, stop in read_once(prefix):
            self._read([stop - start], [stop], stop - start)
        for rows, start, hidden in passes:
            of_rows = length[rows]
            self._read((of_rows - start).tolist(), of_rows.tolist(), hidden.shape[0] * hidden.shape[1])
            yield rows, start, hidden

    def head(self, trajectories: Trajectories) -> None:
        """Counts the head at the trained steps."""
        if self._operations is not None:
            steps = int(trajectories.mask.sum())
            self._stopwatch.compute("head", self._operations.of_head(steps, self._backward))

    def _read(self, tokens: Sequence[int], context: Sequence[int], places: int) -> None:
        """Counts a pass: tokens of its rows, each with those that they attend to, and its places."""
        self._stopwatch.read_through(places, places - sum(tokens))
        if self._operations is not None:
            pairs = sum(n * all_ for n, all_ in zip(tokens, context, strict=True))
            self._stopwatch.compute(self._part, self._operations.body(sum(tokens), pairs, self._backward))


class Counting:
    """Mixin of a setting whose policies' passes are counted."""

    metrics: Metrics

    def counter(self, policy: Policy) -> Counter:
        """Builds the counter of what a policy's passes take."""
        known: dict[str, Operations | None] = vars(self).setdefault("_operations", {})
        if policy.name not in known:
            known[policy.name] = Operations.of(policy)
        part = "student" if policy.name == "student" else "teacher"
        return Counter(self.metrics.stopwatch, known[policy.name], part)
