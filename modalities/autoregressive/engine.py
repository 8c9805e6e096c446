"""What writes completions: the seam for serving engines, and transformers' `generate` behind it.

Shape legend: B trajectories, P prompt width (left padded), T horizon.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...distribution import Head
from ...rollout import Rollout
from ...teacher import Policy
from ...trajectory import Example
from .models import bare
from .sampler import generate


@dataclass
class Prompts:
    """What B trajectories begin with.

    Attributes:
        tokens: ``[B, P]`` each: ``input_ids``, ``attention_mask``, and others where the model has them.
        examples: the B examples, as whoever acts is shown them.
        media: from examples to the model inputs that belong to no token, such as pixels.
        beside: from an example to what tells it from another with the same tokens, such as its images.
    """

    tokens: dict[str, Tensor]
    examples: Sequence[Example]
    media: Callable[[list[Example]], dict[str, Tensor]]
    beside: Callable[[Example], Hashable]

    def inputs(self, rows: Sequence[int], device: Any) -> dict[str, Tensor]:
        """Model inputs for these trajectories."""
        index = torch.tensor(rows)
        media = self.media([self.examples[i] for i in rows])
        return {name: t.to(device) for name, t in ({n: t[index] for n, t in self.tokens.items()} | media).items()}

    @cached_property
    def distinct(self) -> tuple[list[int], list[int]]:
        """The first trajectory of every different prompt, and ``[B]`` the place of each trajectory's prompt there."""
        rows = torch.cat([t.reshape(len(t), -1).long() for t in self.tokens.values()], 1).cpu().numpy()
        same = [row.tobytes() for row in rows]
        several = len(set(same)) < len(same)  # otherwise nobody has to look at an image
        keys = [(tokens, self.beside(e) if several else None) for tokens, e in zip(same, self.examples, strict=True)]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        places = {i: place for place, i in enumerate(sorted(first.values()))}
        return list(places), [places[first[key]] for key in keys]


class RolloutEngine(ABC):
    """Writes completions. A backend is a subclass with this one method; its own settings are its arguments."""

    @abstractmethod
    def write(
        self, policy: Policy, head: Head, prompts: Prompts, rollout: Rollout, seeds: list[int], eos: list[int], pad: int
    ) -> tuple[Tensor, Tensor]:
        """``policy``, already active, goes on from the prompts until a stop token or the horizon.

        Args:
            head: says which ids can be actions (its vocabulary without the suppressed ones), and how logits are made.
            seeds: what trajectory i draws depends on ``seeds[i]`` and its prompt only.
            eos, pad: the ids that end a completion, and what stands behind its end.

        Returns:
            New tokens ``[B, T']``, T' ≤ T, and their log-probs ``[B, T']`` in the plain distribution: temperature 1,
            no filters. What stands behind a stop token is not read.
        """

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """Gives back what it holds elsewhere; it may be asked to write again afterwards."""

    def refusal(self, policy: Policy) -> str | None:
        """Why it hands this policy over to `Generate`, for the start-up table; None: it does not."""
        return None


class Generate(RolloutEngine):
    """transformers' own `generate`, for every model that it serves: the reference for all others."""

    def write(
        self, policy: Policy, head: Head, prompts: Prompts, rollout: Rollout, seeds: list[int], eos: list[int], pad: int
    ) -> tuple[Tensor, Tensor]:
        model = bare(policy.model)
        inputs = prompts.inputs(range(len(seeds)), next(model.parameters()).device)
        return generate(model, head, inputs, rollout, seeds, eos, pad)
