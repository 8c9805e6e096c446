"""The interface of rollout engines, and the prompts that they continue.

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

from ....blend import Blend
from ....distribution import Head
from ....finite import Finite
from ....policy import Policy
from ....rollout_settings import Rollout
from ....trajectory import Example
from ..observing import Heard


@dataclass
class Prompts:
    """Prompts of B trajectories.

    Attributes:
        tokens: ``[B, P]`` each: ``input_ids``, ``attention_mask``, and others where the model has them.
        examples: the B examples, as the policy that acts reads them.
        media: from examples to the model inputs that belong to no token, such as pixels.
        cache_key: from an example to a key that separates examples with equal tokens, such as their images.
        written: number of tokens behind the prompt that were written before, and drawn with the same seeds.
        observing: adds to an example what was observed behind its prompt, for its media.
        typed: values of another tensor, by its name, for token ids behind the prompt. Default: 0, which says text.
    """

    tokens: dict[str, Tensor]
    examples: Sequence[Example]
    media: Callable[[list[Example]], dict[str, Tensor]]
    cache_key: Callable[[Example], Hashable]
    written: int = 0
    observing: Callable[[Example, list[dict[str, Any]]], Example] = lambda example, values: example
    typed: Callable[[str, Tensor], Tensor] = lambda name, ids: torch.zeros_like(ids)

    @property
    def length(self) -> Tensor:
        """Lengths ``[B]`` without padding."""
        return self.tokens["attention_mask"].sum(1)

    def only(self, rows: Sequence[int]) -> Prompts:
        """Selects some of the trajectories, without the padding that only others need."""
        index = torch.tensor(rows)
        padding = self.tokens["input_ids"].shape[1] - int(self.length[index].max())
        tokens = {name: tensor[index, padding:] for name, tensor in self.tokens.items()}
        return replace(self, tokens=tokens, examples=[self.examples[i] for i in rows])

    def continued(self, tokens: Tensor) -> Prompts:
        """Appends tokens ``[B, T]``; of other tensors the mask is 1 there, the rest 0."""
        more = {name: torch.zeros(tokens.shape, dtype=tensor.dtype) for name, tensor in self.tokens.items()}
        more |= {"input_ids": tokens.cpu(), "attention_mask": torch.ones_like(more["attention_mask"])}
        grown = {name: torch.cat([tensor.cpu(), more[name]], 1) for name, tensor in self.tokens.items()}
        return replace(self, tokens=grown, written=self.written + tokens.shape[1])

    def behind(
        self, tokens: Sequence[Sequence[int]], observed: Sequence[list[dict[str, Any]]] | None = None
    ) -> Prompts:
        """Appends to each prompt tokens of its own, and aligns all to the right; draws begin with their first one.

        Args:
            tokens: written or observed ones.
            observed: what of it is more than tokens.
        """
        attended = self.tokens["attention_mask"].cpu().bool()
        lengths = [int(n) + len(more) for n, more in zip(attended.sum(1), tokens, strict=True)]
        grown: dict[str, Tensor] = {}
        for name, tensor in self.tokens.items():
            grown[name] = torch.zeros(len(lengths), max(lengths), dtype=tensor.dtype)
            for i, more in enumerate(tokens):
                row = torch.cat([tensor[i].cpu()[attended[i]], self.values(name, more).to(tensor.dtype)])
                grown[name][i, len(grown[name][i]) - len(row) :] = row
        if observed is None:
            return replace(self, tokens=grown)
        pairs = zip(self.examples, observed, strict=True)
        return replace(self, tokens=grown, examples=[self.observing(example, values) for example, values in pairs])

    def values(self, name: str, ids: Sequence[int]) -> Tensor:
        """Returns the values ``[T]`` of a tensor for token ids behind the prompt, none of which is padding."""
        tokens = torch.tensor(ids, dtype=torch.long)
        if name in ("input_ids", "attention_mask"):
            return tokens if name == "input_ids" else torch.ones_like(tokens)
        return self.typed(name, tokens)

    def media_of(self, observed: Sequence[list[dict[str, Any]]]) -> dict[str, Tensor]:
        """Computes the media of what was observed alone, without those of prompts; of nothing, none."""
        return self.media([self.observing({}, values) for values in observed]) if any(observed) else {}

    def inputs(self, rows: Sequence[int], device: Any) -> dict[str, Tensor]:
        """Collects model inputs of some trajectories on a device."""
        index = torch.tensor(rows)
        media = self.media([self.examples[i] for i in rows])
        return {name: t.to(device) for name, t in ({n: t[index] for n, t in self.tokens.items()} | media).items()}

    @cached_property
    def distinct(self) -> tuple[list[int], list[int]]:
        """Index of the first trajectory of every different prompt, and ``[B]`` each trajectory's index in that list."""
        rows = torch.cat([t.reshape(len(t), -1).long() for t in self.tokens.values()], 1).cpu().numpy()
        same = [row.tobytes() for row in rows]
        several = len(set(same)) < len(same)  # otherwise no image has to be read
        keys = [(tokens, self.cache_key(e) if several else None) for tokens, e in zip(same, self.examples, strict=True)]
        # backwards, so that the first of equal ones stays
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        index = {i: number for number, i in enumerate(sorted(first.values()))}
        return list(index), [index[first[key]] for key in keys]


Ended = Callable[[int, list[int]], None]
"""Takes the place of a row in its pass, and the ids of its turn."""


@dataclass(frozen=True)
class Writer:
    """Policy that writes beside others.

    Attributes:
        policy: not yet active.
        head: its own.
        prompts: as it reads them.
        stops: ids by which it ends.
    """

    policy: Policy
    head: Head
    prompts: Prompts
    stops: list[int]


class Conversation(ABC):
    """Rows that are written turn after turn, and what of them a policy has read.

    Attributes:
        read: ``[B]`` tokens that were read of each row so far; those of a prompt that several begin with, once.
    """

    read: list[int]

    @abstractmethod
    def write(
        self, rows: list[int], heard: list[Heard], rollout: Rollout, seeds: list[int], ended: Ended | None = None
    ) -> tuple[Tensor, Tensor]:
        """Goes on with some rows behind what was heard of each, which none has read, until a stop token or the horizon.

        Args:
            rows: of the B, all of them at first; each one ended with a stop token before.
            heard: nothing at first.
            rollout: its horizon is that of this turn.
            seeds: of this turn's draws, one for each of the rows.
            ended: told of rows that stop while others are written, by engines that know.

        Returns:
            New tokens ``[n, T']`` and their log-probs, as of `RolloutEngine.write`.
        """


class Rereading(Conversation):
    """Conversation by an engine that begins anew at each turn: everything before is read again."""

    def __init__(
        self, engine: RolloutEngine, policy: Policy, head: Head, prompts: Prompts, eos: list[int], pad: int
    ) -> None:
        self._engine, self._policy, self._head, self._prompts = engine, policy, head, prompts
        self._eos, self._pad = eos, pad
        self._texts: list[list[int]] = [[] for _ in prompts.examples]
        self._observed: list[list[dict[str, Any]]] = [[] for _ in prompts.examples]
        self.read = [0] * len(self._texts)

    def write(
        self, rows: list[int], heard: list[Heard], rollout: Rollout, seeds: list[int], ended: Ended | None = None
    ) -> tuple[Tensor, Tensor]:
        for row, more in zip(rows, heard, strict=True):
            self._texts[row] += more.ids
            self._observed[row] += more.values
        texts, observed = [self._texts[row] for row in rows], [self._observed[row] for row in rows]
        prompts = self._prompts.only(rows).behind(texts, observed)
        written = self._engine.write(self._policy, self._head, prompts, rollout, seeds, self._eos, self._pad)
        own, _ = until_stop(written[0], self._eos)
        for row, ids, kept, before in zip(rows, written[0], own, prompts.length.tolist(), strict=True):
            self._texts[row] += ids[kept].tolist()
            self.read[row] += before + int(kept.sum()) - 1
        return written


class RolloutEngine(Finite, ABC):
    """Engine that writes completions. A backend is a subclass with `write`; its settings are its arguments."""

    runs_the_model: ClassVar[bool] = False
    """True where it runs the policy's own model, several rows in a pass: rows that can't share one are separated."""
    blends: ClassVar[bool] = False
    """True where it has `write_blended`."""

    @abstractmethod
    def write(
        self, policy: Policy, head: Head, prompts: Prompts, rollout: Rollout, seeds: list[int], eos: list[int], pad: int
    ) -> tuple[Tensor, Tensor]:
        """Continues the prompts by ``policy``, already active, until a stop token or the horizon.

        Args:
            head: decides which ids can be actions (its vocabulary without the suppressed ones), and computes logits.
            seeds: the draws of trajectory i depend on ``seeds[i]`` and its prompt only.
            eos, pad: the ids that end a completion, and the one behind its end.

        Returns:
            New tokens ``[B, T']``, T' ≤ T, and their log-probs ``[B, T']`` in the plain distribution: temperature 1,
            no filters. Values behind a stop token are not read.
        """

    def write_blended(
        self, writers: dict[str, Writer], blend: Blend, rollout: Rollout, seeds: list[int], eos: list[int], pad: int
    ) -> tuple[Tensor, Tensor]:
        """Continues the prompts of several policies by the same tokens, drawn from what they say together.

        Args:
            writers: by the names in ``blend.policies``.
            blend: mixes what they say.
            rollout, seeds, eos, pad: as in `write`; the student's stop ids end a completion.

        Returns:
            New tokens ``[B, T']``, and their log-probs ``[B, T']`` in the plain mixed distribution.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot blend policies")

    def begin(self, policy: Policy, head: Head, prompts: Prompts, eos: list[int], pad: int) -> Conversation:
        """Begins rollouts of several turns by ``policy``, already active; arguments as in `write`.

        Default: each turn reads again what came before, which a server may have kept.
        """
        return Rereading(self, policy, head, prompts, eos, pad)

    def close(self) -> None:
        """Releases resources outside of this process; `write` may be called again afterwards."""

    def refusal(self, policy: Policy) -> str | None:
        """Explains why it hands this policy over to `Generate`, for the start-up table; None: it does not."""
        return None


def until_stop(tokens: Tensor, eos: list[int]) -> tuple[Tensor, Tensor]:
    """Marks the steps up to and including the first stop token, ``[B, T]`` bool, and rows that have one, ``[B]`` bool.

    Works also where padding and the stop token are the same id: only the first one counts.
    """
    stops = torch.isin(tokens, torch.tensor(eos, device=tokens.device))
    before = stops.cumsum(1) - stops.long()
    return before == 0, stops.any(1)
