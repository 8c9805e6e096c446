"""Scorer: one model that answers the questions of several clients, in batches.

Shape legend: B questions of a batch, P prompt width (left padded), T steps.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save
from torch.nn import functional

from ....distribution import Categorical
from ....policy import Policy, evaluating
from ....printable import quoted
from ....trajectory import Trajectories
from ..engines.trial import first_line
from ..models import bare, context_length
from ..reading import hidden_states
from .inputs import check_inputs, forms
from .question import TEXT, Question, answers
from .store import packed_head


@dataclass(frozen=True)
class Wish:
    """How a question is to be answered; questions of equal wishes share a batch.

    Attributes:
        vocabulary: ids below it can be actions.
        top_k: how many of the likeliest ids to tell.
        hidden: tell hidden states, too.
    """

    vocabulary: int
    top_k: int
    hidden: bool


class Scorer:
    """Answers questions about given token ids; several threads may ask at once.

    Args:
        module: a setting, which reads them.
        policy: the teacher.
        cap: the largest top_k.
        batch_tokens: tokens of a batch, padding included; a longer row has one of its own.
    """

    def __init__(self, module: Any, policy: Policy, cap: int, batch_tokens: int) -> None:
        self.module, self.policy, self.cap, self.batch_tokens = module, policy, cap, batch_tokens
        self.head = module.head(policy)
        self.context = context_length(policy)
        self.rows = bare(policy.model).get_input_embeddings().weight.shape[0]
        inputs = module.shown_inputs(policy)
        self.inputs = forms({name: tensor for name, tensor in inputs.items() if name not in TEXT})
        self.places = {*inputs["input_ids"].flatten().tolist()} & {*module.suppressed()} if inputs else set()
        self.packed_head, self.head_settings = b"", dict[str, Any]()
        if self.head.is_linear:
            self.packed_head, self.head_settings = packed_head(self.head)
        self._waiting: queue.Queue[tuple[Wish, Question, Future[bytes]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="scorer", daemon=True)
        self._thread.start()

    def ask(self, question: Question, wish: Wish) -> Future[bytes]:
        """Takes a question; its answer is a file of safetensors.

        Raises:
            ValueError: it can't be answered, with the reason.
        """
        self._check(question, wish)
        answer: Future[bytes] = Future()
        self._waiting.put((wish, question, answer))
        return answer

    def close(self) -> None:
        """Ends when the questions that wait are answered."""
        self._waiting.put(None)
        self._thread.join()

    def _check(self, question: Question, wish: Wish) -> None:
        tokens = (*question.prompt, *question.actions)
        if not question.prompt or not question.actions or not question.trained:
            raise ValueError("prompt, actions and trained have to hold something")
        if wrong := [i for i in tokens if type(i) is not int or not 0 <= i < self.rows]:
            raise ValueError(f"{quoted(wrong[0])} is no token id: there are those from 0 to {self.rows - 1}")
        if len(tokens) > self.context:
            raise ValueError(f"{len(tokens)} tokens are more than the context of {self.context}")
        steps = question.trained
        if any(type(i) is not int for i in steps) or list(steps) != sorted({*steps} & {*range(len(question.actions))}):
            raise ValueError(f"trained has to be rising places of the {len(question.actions)} actions")
        if not 0 <= wish.top_k <= min(self.cap, wish.vocabulary):
            raise ValueError(f"top_k is {wish.top_k}; this server tells up to {min(self.cap, wish.vocabulary)}")
        if not 0 < wish.vocabulary <= self.head.vocabulary:
            raise ValueError(f"vocabulary is {wish.vocabulary}; this teacher knows {self.head.vocabulary} ids")
        if any(question.actions[step] >= wish.vocabulary for step in steps):
            raise ValueError(f"an action is no id below the vocabulary, {wish.vocabulary}")
        if wish.hidden and not self.head_settings:
            raise ValueError("this teacher's head is no plain matrix, so its hidden states would be of no use")
        if question.inputs:
            check_inputs(question, self.inputs, self.module.padding)
        elif not self.places.isdisjoint(tokens):
            raise ValueError("there are places for images, and none came")

    def _work(self) -> None:
        """Answers all that waits, batch by batch."""
        open_ = True
        while open_:
            waiting = [self._waiting.get()]
            while not self._waiting.empty():
                waiting.append(self._waiting.get_nowait())
            open_ = None not in waiting
            asked = [entry for entry in waiting if entry is not None]
            for wish, form in {(wish, self._form(question)) for wish, question, _ in asked}:
                alike = [(q, answer) for other, q, answer in asked if other == wish and self._form(q) == form]
                for batch in self._batches(alike):
                    self._answer(wish, batch)

    def _form(self, question: Question) -> tuple[Any, ...]:
        """Describes the inputs that rows of one pass can have together: all that differs is how many there are."""
        media = {name: tensor for name, tensor in question.inputs.items() if name not in self.module.padding}
        return tuple(sorted((name, tensor.shape[1:]) for name, tensor in media.items()))

    def _batches(self, asked: list[tuple[Question, Future[bytes]]]) -> Iterator[list[tuple[Question, Future[bytes]]]]:
        """Cuts questions into batches of similar length."""
        batch: list[tuple[Question, Future[bytes]]] = []
        for entry in sorted(asked, key=lambda entry: len(entry[0].prompt) + len(entry[0].actions)):
            longest = len(entry[0].prompt) + len(entry[0].actions)
            if batch and longest * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(entry)
        if batch:
            yield batch

    def _answer(self, wish: Wish, batch: list[tuple[Question, Future[bytes]]]) -> None:
        try:
            packed = self._packed(wish, [question for question, _ in batch])
        except Exception as error:  # of a model, which may raise anything; clients are told, and the server goes on
            if len(batch) > 1:  # one client's question may be the cause, and is no other's concern
                for entry in batch:
                    self._answer(wish, [entry])
                return
            question, answer = batch[0]
            if question.inputs and not isinstance(error, torch.OutOfMemoryError):
                error = ValueError(f"the teacher can't read these inputs: {first_line(error)}")
            answer.set_exception(error)
            return
        for (_, answer), content in zip(batch, packed, strict=True):
            answer.set_result(content)

    @torch.no_grad()
    def _packed(self, wish: Wish, asked: list[Question]) -> list[bytes]:
        device = next(self.policy.model.parameters()).device
        batch = as_trajectories(asked, self.module.padding_id, self.module.padding).to(device)
        names = [name for name in asked[0].inputs if name not in self.module.padding]
        media = {name: torch.cat([question.inputs[name] for question in asked]) for name in names}
        with evaluating(self.policy.model):
            (hidden,) = hidden_states(self.module, self.policy, batch, media=media)
        distribution = Categorical(hidden, replace(self.head, vocabulary=wish.vocabulary))
        dtype = self.head.module.weight.dtype if wish.hidden else None
        told = answers(distribution, batch, self.module.objective.chunk_size, wish.top_k, dtype)
        return [save({name: t.contiguous() for name, t in vars(a).items() if t is not None}) for a in told]


def as_trajectories(asked: list[Question], padding: int, types: Iterable[str] = ()) -> Trajectories:
    """Puts questions beside each other: prompts left padded, actions right padded.

    Args:
        asked: of which all have the same inputs besides ids, or none.
        padding: id of what is no token.
        types: names of inputs of which each token of a prompt has one.
    """
    wide = max(len(question.prompt) for question in asked)
    steps = max(len(question.actions) for question in asked)
    ids, attention = torch.full((len(asked), wide), padding), torch.zeros(len(asked), wide, dtype=torch.long)
    actions, mask = torch.full((len(asked), steps), padding), torch.zeros(len(asked), steps, dtype=torch.bool)
    for row, question in enumerate(asked):
        ids[row, wide - len(question.prompt) :] = torch.tensor(question.prompt)
        attention[row, wide - len(question.prompt) :] = 1
        actions[row, : len(question.actions)] = torch.tensor(question.actions)
        mask[row, list(question.trained)] = True
    of_tokens = {
        name: torch.cat([functional.pad(q.inputs[name], (wide - len(q.prompt), 0)) for q in asked])
        for name in types
        if name in asked[0].inputs
    }
    return Trajectories(
        observation={"input_ids": ids, "attention_mask": attention} | of_tokens,
        actions=actions,
        mask=mask,
        examples=[{"prompt": ""} for _ in asked],
        stopped=torch.zeros(len(asked), dtype=torch.bool),
        behavior_log_probs=torch.full(mask.shape, torch.nan, dtype=torch.float32),
    )
