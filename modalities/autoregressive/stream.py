"""Completions that are read while they are written, by one model for several readers.

Shape legend: B completions of one prompt, P its width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from ...policy import Acting, Policy
from ...rollout_settings import Rollout
from ...rows import reason_of
from ...trajectory import Example
from .audit import stop_ids
from .engines.generate import generate
from .models import bare
from .writing import Writing, prompts_of

REPLACEMENT = "\ufffd"
"""Character that stands for bytes of which others are still to come."""


@dataclass
class Completion:
    """Completion that is being written.

    Attributes:
        decode: from token ids to text.
        ends: ids that end it, which are no text.
        stops: texts that end it, which it does not hold.
        ids: written so far, that of the end included.
        text: decoded so far.
        reason: ``stop`` once an end or a stop was written, ``length`` once there was no more room; None before.
    """

    decode: Callable[[list[int]], str]
    ends: frozenset[int]
    stops: tuple[str, ...] = ()
    ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: str | None = None
    _taken: int = 0

    def add(self, token: int) -> None:
        """Appends a token; nothing behind the end."""
        if self.reason is not None:
            return
        self.ids.append(token)
        if token in self.ends:
            self.reason = "stop"
            return
        self.text = self.decode(self.ids)
        places = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        if places:
            self.text, self.reason = self.text[: min(places)], "stop"

    def take(self) -> str:
        """Returns what is new and certain: neither half of a character nor what may begin a stop."""
        certain = len(self.text)
        if self.reason is None:
            certain -= len(self.text) - len(self.text.rstrip(REPLACEMENT))
            starts = (length for stop in self.stops for length in range(1, len(stop)))
            held = max((length for length in starts if self._ends_with_start(length)), default=0)
            certain = min(certain, len(self.text) - held)
        new = self.text[self._taken : certain]
        self._taken += len(new)
        return new

    def _ends_with_start(self, length: int) -> bool:
        return any(len(stop) > length and self.text.endswith(stop[:length]) for stop in self.stops)


class Turns:
    """Lock that is handed on in the order in which it was asked for, so that writers advance side by side."""

    def __init__(self) -> None:
        self._changed, self._given, self._current = threading.Condition(), 0, 0

    def __enter__(self) -> None:
        with self._changed:
            ticket, self._given = self._given, self._given + 1
            self._changed.wait_for(lambda: self._current == ticket)

    def __exit__(self, *_: Any) -> None:
        with self._changed:
            self._current += 1
            self._changed.notify_all()

    @contextmanager
    def let_others(self) -> Iterator[None]:
        """Gives the turn away within a block."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()


class Listener(BaseStreamer):
    """Streamer of `generate` that hands each token on, while others may have their turn.

    Args:
        completions: the B that are written.
        hear: called after every step.
        turns: held while the model runs.
    """

    def __init__(self, completions: Sequence[Completion], hear: Callable[[], None], turns: Turns) -> None:
        self._completions, self._hear, self._turns, self._is_prompt = completions, hear, turns, True

    def put(self, value: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for completion, token in zip(self._completions, value.flatten().tolist(), strict=True):
            completion.add(token)
        with self._turns.let_others():
            self._hear()

    def end(self) -> None: ...


class AtStops(StoppingCriteria):
    """Criterion of `generate`: completions in which a stop was written have ended."""

    def __init__(self, completions: Sequence[Completion]) -> None:
        self._completions = completions

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        ended = [completion.reason is not None for completion in self._completions]
        return torch.tensor(ended, device=input_ids.device)


def stream(
    module: Writing,
    acting: Acting,
    rollout: Rollout,
    seeds: list[int],
    stops: tuple[str, ...] = (),
    hear: Callable[[], None] = lambda: None,
    turns: Turns | None = None,
    completions: list[Completion] | None = None,
) -> list[Completion]:
    """Continues one prompt by a policy, B times, by transformers' `generate`, and returns what was written.

    Args:
        module: the setting.
        acting: policy, and its prompt once: ``[1, P]``.
        rollout: temperature, filters and horizon.
        seeds: of the B completions.
        stops: texts that end a completion, besides the policy's stop ids.
        hear: called after every step; what it raises ends the writing.
        turns: shared by those who write with the same model; default: nobody else does.
        completions: those that `hear` reads, from `begun`; default: new ones.
    """
    policy, model = acting.policy, bare(acting.policy.model)
    completions = begun(module, policy, len(seeds), stops) if completions is None else completions
    repeated = {name: tensor.repeat_interleave(len(seeds), 0) for name, tensor in acting.prompts.items()}
    prompts = prompts_of(module, Acting(policy, repeated, acting.examples * len(seeds)), rollout)
    inputs = prompts.inputs(range(len(seeds)), next(model.parameters()).device)
    ends, turns = sorted(completions[0].ends), turns or Turns()
    hooks: dict[str, Any] = {
        "streamer": Listener(completions, hear, turns),
        "stopping_criteria": StoppingCriteriaList([AtStops(completions)]),
    }
    with turns, policy.active():
        generate(model, module.head(policy), inputs, rollout, seeds, ends, module.padding_id, **hooks)
    for completion in completions:
        completion.reason = completion.reason or "length"
    return completions


def begun(module: Writing, policy: Policy, count: int, stops: tuple[str, ...] = ()) -> list[Completion]:
    """Begins so many completions of a policy, which ends its turns by its own stop ids and the student's."""
    ends = frozenset({*module.eos, *stop_ids(module, policy)})
    return [Completion(_decoder(module, ends), ends, stops) for _ in range(count)]


def _decoder(module: Writing, ends: frozenset[int]) -> Callable[[list[int]], str]:
    return lambda ids: module.written_as([i for i in ids if i not in ends])


def acting_on(module: Any, policy: Policy, reader: Policy, example: Example) -> Acting:
    """Prepares a row as a policy reads it; ``reader``: whose template and tokenizer write its prompt.

    Raises:
        ValueError: it can't be read, with the reason.
    """
    try:
        return Acting(policy, module.collate([example], reader), [example])
    except Exception as error:  # of a template or a tokenizer, which may raise anything
        raise ValueError(reason_of(error)) from error
