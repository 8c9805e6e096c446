"""Questions to teachers that are elsewhere, and their answers.

Shape legend: B trajectories, T steps, n trained steps of one trajectory, k ids told of each, H hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....distribution import IMPOSSIBLE, Categorical, CategoricalChunk, Distribution, Head, Scored
from ....objective.chunks import Chunks, ChunkSize
from ....objective.steps import Steps
from ....teacher import Teacher
from ....trajectory import Example, Trajectories

TEXT = ("input_ids", "attention_mask")
"""What a model reads of text."""


@dataclass(frozen=True)
class Question:
    """One trajectory, as a teacher reads it.

    Attributes:
        prompt: its token ids, through the teacher's view.
        actions: token ids behind it, up to the last that is trained.
        trained: which of the actions are.
        media: fingerprint of the images that the prompt shows; empty: none.
        inputs: what the model reads of them besides ids, such as pixels, of this row alone; ``media`` stands for them.
    """

    prompt: tuple[int, ...]
    actions: tuple[int, ...]
    trained: tuple[int, ...]
    media: str = ""
    inputs: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def key(self) -> str:
        """Fingerprint of the prompt, by which an answer is found again."""
        return hashlib.sha256(np.array(self.prompt, np.int64).tobytes() + self.media.encode()).hexdigest()[:32]


@dataclass
class Answer:
    """Answer of a teacher about the n trained steps of one trajectory.

    Attributes:
        log_probs: ``[n]`` of the actions, at temperature 1.
        ids, top: ``[n, k]`` the likeliest ids and their log-probs; None: not told.
        hidden: ``[n, H]``, before the teacher's head; None: not told.
    """

    log_probs: Tensor
    ids: Tensor | None = None
    top: Tensor | None = None
    hidden: Tensor | None = None

    def at(self, steps: Sequence[int]) -> Answer:
        """Restricts it to some of its steps."""
        index = torch.tensor(steps, dtype=torch.long)
        fields = (self.log_probs, self.ids, self.top, self.hidden)
        return Answer(*(None if t is None else t[index] for t in fields))  # type: ignore[arg-type]


def check_tokens(setting: Any, teacher: Teacher) -> None:
    """Refuses settings whose students write no tokens.

    Raises:
        ValueError: questions are about token ids.
    """
    if not hasattr(setting, "tokenizer"):
        raise ValueError(
            f"model.teachers.{teacher.name}: {type(teacher.weights).__name__} is told about tokens, and students of "
            f"{type(setting).__name__} write none"
        )


def questions(
    setting: Any, batch: Trajectories, views: Sequence[Example | None], show: bool = False
) -> list[Question | None]:
    """Asks about every trajectory, as the student's tokenizer and template write it.

    Args:
        setting: of the run.
        batch: what the student did.
        views: the rows as the teacher reads them; None where there is no view, and no question.
        show: add what the student's processor makes of images.
    """
    if batch.observed is not None and any(batch.observed):
        raise ValueError("trajectories observed more than text behind their prompts, which nobody elsewhere is told")
    own = setting.shown(batch.examples, batch.student_view)
    examples = [row if view is None else view for row, view in zip(own, views, strict=True)]
    asked = asked_of(batch, setting.collate(examples, setting.policies["student"]))
    for row, (example, view, question) in enumerate(zip(examples, views, asked, strict=True)):
        if view is None or question is None:
            asked[row] = None
        elif images := setting.cache_key(example):
            media, inputs = hashlib.sha256(repr(images).encode()).hexdigest(), {}
            if show:
                inputs = inputs_of(setting, example)
            asked[row] = replace(question, media=media, inputs=inputs)
    return asked


def asked_of(batch: Trajectories, prompts: dict[str, Tensor]) -> list[Question | None]:
    """Asks about every trajectory behind a prompt ``[B, P]``; None where no step is trained."""
    asked: list[Question | None] = []
    for ids, attention, actions, mask in zip(
        prompts["input_ids"], prompts["attention_mask"], batch.actions, batch.mask, strict=True
    ):
        trained = mask.nonzero().flatten().tolist()
        written = actions[: trained[-1] + 1].tolist() if trained else ()
        asked.append(Question(tuple(ids[attention > 0].tolist()), tuple(written), tuple(trained)) if trained else None)
    return asked


def inputs_of(setting: Any, example: Example) -> dict[str, Tensor]:
    """Computes what the student reads of one row besides ids: types of tokens, and pixels."""
    student = setting.policies["student"]
    types = {name: tensor for name, tensor in setting.collate([example], student).items() if name not in TEXT}
    return types | setting.media([example], student)


@torch.no_grad()
def answers(
    distribution: Distribution, batch: Trajectories, size: ChunkSize, top_k: int = 0, hidden: torch.dtype | None = None
) -> list[Answer]:
    """Takes down what a teacher says of the trained steps of each trajectory, on the CPU.

    Args:
        distribution: at all B × T states.
        batch: what the student did.
        size: how many steps are projected to logits at once.
        top_k: ids to tell of each step, the likeliest ones; 0: none.
        hidden: tell hidden states, too, in this dtype.

    Raises:
        TypeError: hidden states, of a teacher that has none here.
    """
    # 1. in chunks, as the objective does
    steps, pieces = Steps.of(batch), []
    for _, chunk in Chunks.at(distribution, {}, steps, size).opened():
        told: Any = chunk.student
        top = told.known()[0].topk(top_k) if top_k and isinstance(told, CategoricalChunk) else None
        pieces.append((told.log_prob(chunk.action), *(() if top is None else (top.indices, top.values))))
        del chunk, told  # logits must not outlive their piece
    columns = [torch.cat(column).cpu() for column in zip(*pieces, strict=True)]
    log_probs, ids, values = [*columns, None, None][:3]
    flat = distribution.at(steps.index)
    if isinstance(flat, Scored) and flat.ids is not None and flat.top is not None and top_k:
        ids, values = flat.ids[:, :top_k].cpu(), flat.top[:, :top_k].cpu()
    states = None
    if hidden is not None:
        if not isinstance(flat, Categorical):
            raise TypeError("a teacher that is elsewhere has no hidden states here")
        states = flat.hidden.cpu().to(hidden)
    # 2. cut into trajectories
    lengths = batch.length.tolist()
    cut = [[None] * len(lengths) if t is None else t.split(lengths) for t in (log_probs, ids, values, states)]
    return [Answer(*fields) for fields in zip(*cut, strict=True)]


def scored(told: Sequence[Answer | None], batch: Trajectories, vocabulary: int, top_k: int, who: str) -> Scored:
    """Puts answers at the states of a batch.

    Args:
        told: of each trajectory; None where nobody reads it.
        batch: what the student did.
        vocabulary: ids below it can be actions.
        top_k: ids that are told of each step.
        who: told it, for messages.

    Raises:
        ValueError: as in `Scored.check`.
    """
    shape = batch.mask.shape
    log_probs = torch.full(shape, -float(np.log(vocabulary)))
    ids = torch.full((*shape, top_k), -1) if top_k else None
    top = torch.full((*shape, top_k), IMPOSSIBLE) if top_k else None
    for row, answer in enumerate(told):
        if answer is None:
            continue
        here = batch.mask[row].cpu()
        log_probs[row, here] = answer.log_probs.float()
        if ids is not None and top is not None and answer.ids is not None and answer.top is not None:
            known = (answer.ids >= 0) & (answer.ids < vocabulary)  # others are padding of the head
            ids[row, here] = torch.where(known, answer.ids, -1)[:, :top_k].long()
            top[row, here] = torch.where(known, answer.top.float(), IMPOSSIBLE)[:, :top_k]
    values = Scored(log_probs, batch.actions.cpu(), vocabulary, ids, top)
    values.check(batch.mask.cpu() & torch.tensor([answer is not None for answer in told])[:, None], who)
    return values


def stated(told: Sequence[Answer | None], batch: Trajectories, head: Head) -> Categorical:
    """Puts hidden states at the states of a batch, with the teacher's head.

    Args:
        told: of each trajectory; None where nobody reads it.
        batch: what the student did.
        head: the teacher's, whose module is moved to the batch's device.

    Raises:
        ValueError: a hidden state is missing, or no number.
    """
    weight: Any = head.module.weight
    hidden = torch.zeros(*batch.mask.shape, weight.shape[1], dtype=weight.dtype)
    for row, answer in enumerate(told):
        if answer is not None:
            if answer.hidden is None or not bool(answer.hidden.isfinite().all()):
                raise ValueError("hidden states are missing, or no numbers")
            hidden[row, batch.mask[row].cpu()] = answer.hidden.to(weight.dtype)
    head.module.to(batch.mask.device)
    return Categorical(hidden.to(batch.mask.device), head)
