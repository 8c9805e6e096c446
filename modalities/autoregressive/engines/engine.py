"""What writes completions: prompts, and the interface of every rollout engine.

Shape legend: B trajectories, P prompt width (left padded), T horizon.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....distribution import Head
from ....finite import Finite
from ....policy import Policy
from ....rollout_settings import Rollout
from ....trajectory import Example


@dataclass
class Prompts:
    """What B trajectories begin with.

    Attributes:
        tokens: ``[B, P]`` each: ``input_ids``, ``attention_mask``, and others where the model has them.
        examples: the B examples, as whoever acts is shown them.
        media: from examples to the model inputs that belong to no token, such as pixels.
        cache_key: from an example to what tells it from another with the same tokens, such as its images.
        written: how many of the tokens are not of the prompt but were written before, and drawn with the same seeds.
    """

    tokens: dict[str, Tensor]
    examples: Sequence[Example]
    media: Callable[[list[Example]], dict[str, Tensor]]
    cache_key: Callable[[Example], Hashable]
    written: int = 0

    @property
    def length(self) -> Tensor:
        """``[B]`` tokens without padding."""
        return self.tokens["attention_mask"].sum(1)

    def only(self, rows: Sequence[int]) -> Prompts:
        """Some of the trajectories, without the padding that only the others need."""
        index = torch.tensor(rows)
        padding = self.tokens["input_ids"].shape[1] - int(self.length[index].max())
        tokens = {name: tensor[index, padding:] for name, tensor in self.tokens.items()}
        return replace(self, tokens=tokens, examples=[self.examples[i] for i in rows])

    def continued(self, tokens: Tensor) -> Prompts:
        """The same with further tokens ``[B, T]``, whose places beside ``input_ids`` are 1 in the mask and else 0."""
        more = {name: torch.zeros(tokens.shape, dtype=tensor.dtype) for name, tensor in self.tokens.items()}
        more |= {"input_ids": tokens.cpu(), "attention_mask": torch.ones_like(more["attention_mask"])}
        grown = {name: torch.cat([tensor.cpu(), more[name]], 1) for name, tensor in self.tokens.items()}
        return replace(self, tokens=grown, written=self.written + tokens.shape[1])

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
        keys = [(tokens, self.cache_key(e) if several else None) for tokens, e in zip(same, self.examples, strict=True)]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        places = {i: place for place, i in enumerate(sorted(first.values()))}
        return list(places), [places[first[key]] for key in keys]


class RolloutEngine(Finite, ABC):
    """Writes completions. A backend is a subclass with this one method; its own settings are its arguments."""

    runs_the_model: ClassVar[bool] = False
    """Whether it runs the policy's own model, several rows in a pass: rows that can't share one come apart then."""

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

    def close(self) -> None:
        """Gives back what it holds elsewhere; it may be asked to write again afterwards."""

    def refusal(self, policy: Policy) -> str | None:
        """Why it hands this policy over to `Generate`, for the start-up table; None: it does not."""
        return None


def until_stop(tokens: Tensor, eos: list[int]) -> tuple[Tensor, Tensor]:
    """``[B, T]`` steps up to and including the first stop token, and ``[B]`` whether there was one.

    Works also where padding and the stop token are the same id: only the first one counts.
    """
    stops = torch.isin(tokens, torch.tensor(eos, device=tokens.device))
    before = stops.cumsum(1) - stops.long()
    return before == 0, stops.any(1)
