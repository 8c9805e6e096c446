"""OtherTokenizer: a teacher that reads the text of rollouts, in its own tokens.

Shape legend: B trajectories, T steps of the student, W tokens of the teacher, n and m of one trajectory, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....distribution import Aligned, Categorical, Scored
from ....likeness import fingerprint
from ....loading import loading
from ....policy import Policy, evaluating
from ....pretrained import Pretrained
from ....progress import phase
from ....teacher import Elsewhere, Teacher
from ....trajectory import Example, Trajectories
from ..audit import stop_ids
from ..engines.trial import check_causal, check_head
from ..models import context_length, known_ids
from ..passes import last_trained
from ..reading import hidden_states
from ..rendering import Renderer
from .alignment import Chunk, Pieces, chunks, ends_of, matches, text_of
from .question import Answer, answers, asked_of, check_tokens, stated
from .remote import Remote


@dataclass(frozen=True)
class Rewritten:
    """One trajectory in the teacher's tokens.

    Attributes:
        ids: of the answer's text, and the token that ends it where the student wrote one.
        chunks: those that the teacher can judge.
    """

    ids: tuple[int, ...] = ()
    chunks: tuple[Chunk, ...] = ()


class OtherTokenizer(Elsewhere):
    """A frozen model with another tokenizer: it reads its own template's prompt and the text of the rollout.

    The tokens that write the same bytes are chunks (`alignment.chunks`), whose log-probs L_S = Σ log p(s_i), as the
    student acted, and L_T = Σ log q(t_j) are compared: log q(s_i) = (L_T/L_S)·log p(s_i) (Breaking the Tokenizer
    Barrier, 2606.09456), in equal parts where L_S is 0. Where each side has one token that is L_T itself, so that
    equal tokenizers give the plain log-probs. The tokens that end an answer are a chunk. What the teacher can't judge
    (an unfinished character at the horizon, an unknown token of its own, what its context has no room for) gets the
    student's own log-prob, an advantage of 0.

    Its own distributions over its own vocabulary are there for `ULD` and `HybridULD`, at the states that ``pairs``
    names.

    Args:
        pretrained: the model and its tokenizer, a fast one; where a server answers, configuration and tokenizer alone.
        pairs: which of its states goes with one of the student's for those: ``text`` (default): where chunks begin;
            ``position``: the t-th with the t-th, up to the shorter end (ULD, 2402.12030).
        server: answers for the model, which is then not loaded here. Log-probs of the text are all that it is asked
            for; with ``hidden: true`` its own distributions are there, too. Default: none.

    Raises:
        ValueError: ``pairs`` is something else, or the server is asked for likeliest ids, which nothing reads; when
            models are loaded: the setting shows images, a tokenizer does not tell what its tokens write; when asked: a
            completion of several turns; otherwise as in `Remote`.
        ConnectionError: as in `Remote`.
    """

    policy: Policy
    refusal = "reads and writes other tokens than the student's"

    def __init__(
        self, pretrained: Pretrained, pairs: Literal["text", "position"] = "text", server: Remote | None = None
    ) -> None:
        if pairs not in ("text", "position"):
            raise ValueError(f"OtherTokenizer.pairs is text or position, not {pairs!r}")
        if server is not None and server.asks:
            raise ValueError(
                f"OtherTokenizer.server.top_k={server.asks}: likeliest ids of another vocabulary are read by nothing; "
                "leave it out, or set hidden: true for whole distributions (dialect: opd)"
            )
        self.pretrained, self.pairs, self.server = pretrained, pairs, server
        self.aligns = server is None or server.top_k is None

    def connect(self, teacher: Teacher, setting: Any) -> dict[str, str]:
        where = f"model.teachers.{teacher.name}"
        check_tokens(setting, teacher)
        student = setting.policies["student"]
        if not isinstance(student.processor, PreTrainedTokenizerBase):
            raise ValueError(f"{where}: OtherTokenizer is given text alone, and {type(setting).__name__} shows images")
        # 1. the model, and how its logits are made
        with loading(f"{where}.weights.pretrained"), phase(f"loading the teacher {teacher.name}"):
            kind, is_here = setting.model_class, self.server is None
            model = self.pretrained.load(kind, trained=False) if is_here else self.pretrained.outline(kind)
            processor = setting.load_processor(self.pretrained)
        self.policy = Policy(model, processor, path=self.pretrained.path, name=teacher.name)
        vocabulary = min(1 + max(processor.get_vocab().values()), known_ids(self.policy))
        self._context, self._head = context_length(self.policy), None
        if self.server is None:
            self._head = replace(setting.head(self.policy), vocabulary=vocabulary, suppressed=None)
            check_head(teacher.name, self.policy, self._head)
            check_causal(self.policy, vocabulary)
            facts = {"weights": f"{fingerprint(model)} (OtherTokenizer, {self.pretrained.path})"}
        else:
            facts = self.server.greet(where, setting, self.policy, vocabulary)
            self._head = self.server.head
            self._context = min(self._context, self.server.context or self._context)
        self._stops = stop_ids(setting, self.policy)
        if not self._stops:
            raise ValueError(f"{where}: {self.pretrained.path} has no token that ends an answer")
        # 2. the two tokenizers
        with loading(where):
            self._of_student, self._own = Pieces(student.processor), Pieces(processor)
            self._of_student.check(setting.vocabulary)
        self.is_same = student.processor.get_vocab() == processor.get_vocab()
        ends = (setting.eos[0], self._stops[0])
        pairs = matches(self._of_student, self._own, (setting.vocabulary, vocabulary), ends)
        self._matched = torch.tensor(pairs).T
        other = f"{vocabulary} tokens, of which {len(pairs)} write what the student's do"
        return {
            "template": "none: prompts as they are" if processor.chat_template is None else "its own",
            **facts,
            "tokenizer": "the student's" if self.is_same else other,
            "stop ids": str(self._stops),
        }

    def same(self, now: str, before: str) -> bool:
        return super().same(now, before) if self.server is None else self.server.same(now, before)

    def close(self) -> None:
        if self.server is not None:
            self.server.close()

    def ahead(self, teacher: Teacher, setting: Any, batch: Trajectories, views: list[Example | None]) -> None:
        if self.server is not None:
            _, answered = self._read(teacher, setting, batch, views)
            self.server.send(asked_of(answered, answered.observation))

    @torch.no_grad()
    def say(self, teacher: Teacher, setting: Any, batch: Trajectories, views: list[Example | None]) -> Scored:
        # 1. what it says of the text, in its own tokens
        rows, answered = self._read(teacher, setting, batch, views)
        distribution, told = self._judged(teacher, setting, answered)
        # 2. at the student's states
        acted = batch.behavior_log_probs.cpu()
        log_probs = torch.where(acted.isnan(), -math.log(setting.vocabulary), acted)
        place, paired = torch.zeros(acted.shape, dtype=torch.long), torch.zeros(acted.shape, dtype=torch.bool)
        rest = torch.zeros(*acted.shape, 2, dtype=torch.float32)
        for number, (row, answer, last) in enumerate(zip(rows, told, last_trained(batch).tolist(), strict=True)):
            if self.pairs == "position":
                length = min(last, len(row.ids))
                place[number, :length], paired[number, :length] = torch.arange(length), True
            if row.chunks:
                steps, values = projected(row.chunks, acted[number], answer.log_probs)
                log_probs[number, steps] = values.to(log_probs.dtype)
            if row.chunks and self.pairs == "text":
                start, other = torch.tensor([(chunk.start, chunk.teacher_start) for chunk in row.chunks]).T
                place[number, start], paired[number, start] = other, True
                rest[number, start] = later(row.chunks, acted[number], answer.log_probs)
        if distribution is None:
            return Scored(log_probs, batch.actions.cpu(), setting.vocabulary)
        hidden = distribution.hidden
        index = place.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
        return Aligned(
            log_probs,
            batch.actions.cpu(),
            setting.vocabulary,
            own=Categorical(hidden.gather(1, index), distribution.head),
            paired=paired,
            rest=rest,
            matched=self._matched,
        )

    def _read(
        self, teacher: Teacher, setting: Any, batch: Trajectories, views: list[Example | None]
    ) -> tuple[list[Rewritten], Trajectories]:
        """Writes trajectories in the teacher's tokens, behind the prompts of its own template."""
        own = setting.shown(batch.examples, batch.student_view)
        examples = [row if view is None else view for row, view in zip(own, views, strict=True)]
        last = last_trained(batch).tolist()
        written = [batch.actions[row, :stop].tolist() for row, stop in enumerate(last)]
        rows = [
            Rewritten() if view is None or not ids else self._rewritten(teacher, setting, row, example, ids)
            for row, example, view, ids in zip(own, examples, views, written, strict=True)
        ]
        prompts = setting.collate(examples, self.policy)
        # padding is of the student's vocabulary, which may be the larger one
        prompts["input_ids"] = prompts["input_ids"].masked_fill(prompts["attention_mask"] == 0, 0)
        return rows, _answered(prompts, rows, batch)

    def _judged(
        self, teacher: Teacher, setting: Any, answered: Trajectories
    ) -> tuple[Categorical | None, Sequence[Answer]]:
        """Asks about the text in its tokens; returns its distributions, None where they are not told, and log-probs."""
        size = setting.objective.chunk_size
        if self.server is None:
            assert self._head is not None
            self.policy.model.to(answered.mask.device)
            with evaluating(self.policy.model):
                (hidden,) = hidden_states(setting, self.policy, answered)
            distribution = Categorical(hidden, self._head)
            return distribution, answers(distribution, answered, size)
        try:
            told = self.server.answered(asked_of(answered, answered.observation))
            nothing = Answer(torch.zeros(0))
            given = [answer or nothing for answer in told]
            return None if self._head is None else stated(told, answered, self._head), given
        except ValueError as error:
            raise ValueError(f"model.teachers.{teacher.name}: {error}") from error

    def _rewritten(self, teacher: Teacher, setting: Any, own: Example, example: Example, ids: list[int]) -> Rewritten:
        """Writes one trajectory in the teacher's tokens.

        Args:
            teacher: the entry of ``model.teachers``.
            setting: of the run.
            own: the row as the student read it.
            example: the row as the teacher reads it.
            ids: what the student wrote, up to the last trained step.

        Raises:
            ValueError: the answer goes on behind a stop token.
        """
        renderer, asked, stops = setting.renderer(self.policy), setting.asked(example), {*setting.eos}
        if any(token in stops for token in ids[:-1]):
            raise ValueError(
                f"model.teachers.{teacher.name}: a completion goes on behind the token that ends a turn; "
                "OtherTokenizer reads answers of one turn"
            )
        # 1. tokens of both sides that write the same
        answer = ids[:-1] if ids[-1] in stops else ids
        is_ended = len(answer) < len(ids)
        if self.is_same:
            others, cut = list(answer), [Chunk(i, i + 1, i, i + 1) for i in range(len(answer))]
        else:
            # behind a raw prompt, which both read alike, a leading space is a space
            is_text = not setting.renderer(setting.policies["student"]).is_raw(own["prompt"])
            text, ends = text_of(self._of_student.all_of(answer, is_text), is_ended)
            others, cut = self._cut(renderer, asked, text, ends)
        # 2. the end of the answer
        if is_ended:
            cut.append(Chunk(len(answer), len(ids), len(others), len(others) + 1))
            others.append(ids[-1] if self.is_same else renderer.stop(asked, self._stops))
        # 3. what there is room for
        room = self._context - len(renderer.prompt_ids(asked))
        if len(others) > room:
            rank_zero_warn(
                f"model.teachers.{teacher.name}: a prompt and an answer of {len(others)} tokens are longer than its "
                f"context of {self._context}; what is beyond is not judged"
            )
        return Rewritten(tuple(others[:room]), tuple(chunk for chunk in cut if chunk.teacher_stop <= room))

    def _cut(self, renderer: Renderer, asked: Example, text: str, ends: Sequence[int]) -> tuple[list[int], list[Chunk]]:
        """Tokenizes a text behind the teacher's prompt, and cuts it into the chunks that it can judge.

        Args:
            renderer: of the teacher.
            asked: the row as it reads it.
            text: of the answer.
            ends: for each token of the student that is read, the bytes of the text up to its end.
        """
        space = "" if text[:1].isspace() else renderer.space(asked)
        before, behind = renderer.prompt(asked), space + text
        ids = renderer.continuation(before, behind)
        stops = ends_of(self._own, ids, behind, renderer.offsets(before, behind))
        # what the template writes, and the student did not, is context
        own = [stop - len(space.encode()) for stop in stops]
        first = sum(stop <= 0 for stop in own) if space else 0
        unknown = renderer.tokenizer.unk_token_id
        moved = [
            Chunk(c.start, c.stop, c.teacher_start + first, c.teacher_stop + first) for c in chunks(ends, own[first:])
        ]
        return ids, [c for c in moved if unknown is None or unknown not in ids[c.teacher_start : c.teacher_stop]]


def _answered(prompts: dict[str, Tensor], rows: Sequence[Rewritten], batch: Trajectories) -> Trajectories:
    """Puts answers in the teacher's tokens behind its prompts, ``[B, W]``."""
    width = max(1, *(len(row.ids) for row in rows))
    actions = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows])
    mask = torch.tensor([[place < len(row.ids) for place in range(width)] for row in rows])
    device, unknown = batch.mask.device, torch.full(mask.shape, torch.nan, dtype=torch.float32)
    answered = Trajectories(prompts, actions.to(device), mask.to(device), batch.examples, batch.stopped, unknown)
    return replace(answered, student_view=batch.student_view)


def projected(cut: Sequence[Chunk], acted: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
    """Shares the teacher's log-prob of each chunk out to the student's tokens, log q_i = (L_T/L_S)·log p_i.

    Where L_S is 0, or nobody knows it, in equal parts.

    Args:
        cut: chunks.
        acted: ``[n]`` log p of the student's tokens, as it acted.
        told: ``[m]`` log q of the teacher's.

    Returns:
        Steps that are in a chunk, and their log-probs.
    """
    of_student, of_teacher = (
        torch.tensor([(token, number) for number, c in enumerate(cut) for token in range(c[side], c[side + 1])]).T
        for side in (0, 2)
    )
    steps, number = of_student
    own, none = acted.double()[steps], torch.zeros(len(cut), dtype=torch.float64)
    of_chunk = none.index_add(0, number, own)[number]
    of_other = none.index_add(0, of_teacher[1], told.double()[of_teacher[0]])[number]
    count = torch.bincount(number, minlength=len(cut))[number]
    share = torch.where((count > 1) & (of_chunk < 0), own / of_chunk, 1.0 / count)
    return steps, of_other * share


def later(cut: Sequence[Chunk], acted: Tensor, told: Tensor) -> Tensor:
    """Returns the log-prob of each chunk's tokens behind the first, of the student and of the teacher ``[C, 2]``."""
    sums = [(acted[c.start + 1 : c.stop].sum(), told[c.teacher_start + 1 : c.teacher_stop].sum()) for c in cut]
    return torch.tensor(sums)
