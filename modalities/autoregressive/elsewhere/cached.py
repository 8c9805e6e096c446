"""Cached: a teacher whose answers were recorded before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ....distribution import Distribution
from ....likeness import UNKNOWN, taught_by
from ....printable import quoted
from ....teacher import Elsewhere, Teacher
from ....trajectory import Example, Trajectories
from .handshake import same_weights
from .identity import READ, differences, reading
from .question import check_tokens, questions, scored, stated
from .store import Store, read_about, read_head

SERVED = 0.05
"""Nats that what a server made of a known text may be from what it was; the default of ``Remote.tolerance``."""


class Cached(Elsewhere):
    """A teacher whose answers `opd score` recorded: it is loaded by nobody, and knows of recorded completions alone.

    With recorded log-probs of the actions, and of the likeliest ones, it serves what an `Elsewhere` teacher can; with
    recorded hidden states everything that the teacher itself could.

    Args:
        path: the folder that `opd score` wrote.
        teacher: whose answers: the entry of ``model.teachers`` that it had there.
        consistent: refuse a student that another teacher taught before, as far as `opd export` wrote down who did.
            Where supervised fine-tuning and distillation had different teachers, Lightning OPD (2604.13010) lost up to
            6.8 points. Default: yes.

    Raises:
        FileNotFoundError: nothing was recorded there.
        ValueError: nothing of this teacher; when models are loaded: the answers are about rows as another tokenizer,
            template or view wrote them; when asked: a trajectory that was not recorded.
    """

    recorded = True

    def __init__(self, path: str, teacher: str = "teacher", consistent: bool = True) -> None:
        self.path, self.teacher, self._about = Path(path), teacher, read_about(Path(path))
        if teacher not in self._about["teachers"]:
            raise ValueError(f"{path} has no answers of {teacher!r}, but of {sorted(self._about['teachers'])}")
        self._own: dict[str, Any] = self._about["teachers"][teacher]
        self.consistent = consistent
        self.top_k = None if "hidden" in self._own else self._own["top_k"]

    def connect(self, teacher: Teacher, setting: Any) -> dict[str, str]:
        where = f"model.teachers.{teacher.name}: {self.path}"
        check_tokens(setting, teacher)
        if not self._about["complete"]:
            raise ValueError(f"{where} is not complete; run the same `opd score` again, it goes on where it was")
        now = reading(setting, teacher)
        if different := differences(self._own, now, READ):
            raise ValueError(
                f"{where} was recorded otherwise than this run reads: {'; '.join(different)}. Set it as it was, or "
                "record anew"
            )
        self._store = Store(self.path, self.teacher, self._about)
        self._head = None
        if "hidden" in self._own:
            packed = (self.path / f"{self.teacher}.safetensors").read_bytes()
            self._head = read_head(packed, setting.vocabulary, self._own["hidden"])
        before = taught_by(setting._student_spec.path)
        consistency = self._consistency(before)
        if consistency == "no" and self.consistent:
            raise ValueError(
                f"{where} has answers of the weights {self._own['weights']}, and {setting._student_spec.path} was "
                f"taught by others before ({', '.join(sorted(before))}): distilling recorded rollouts then has a bias "
                "that does not vanish (2604.13010). Record the teacher that it had, or set weights.consistent: false"
            )
        tells = "hidden states" if self._head else f"log-probs of the actions and {self.top_k} likeliest ids"
        return {
            "answers": f"{len(self._store)} in {self.path}",
            "tells": tells,
            "weights": self._own["weights"],
            "taught the student before": consistency,
        }

    def same(self, now: str, before: str) -> bool:
        return same_weights(now, before, SERVED)

    def _consistency(self, before: set[str]) -> str:
        """Says whether this teacher is among those that the student had before."""
        own = self._own["weights"].split()[0]
        return "not known" if not before or own.startswith(UNKNOWN) else "yes" if own in before else "no"

    def say(self, teacher: Teacher, setting: Any, batch: Trajectories, views: list[Example | None]) -> Distribution:
        told = []
        for row, question in enumerate(questions(setting, batch, views)):
            answer = None if question is None else self._store.find(question)
            if isinstance(answer, str):
                raise ValueError(
                    f"model.teachers.{teacher.name}: {self.path} has no answer about the row with the prompt "
                    f"{quoted(batch.examples[row].get('prompt'))}: {answer}. It was recorded with rollout.horizon "
                    f"{self._about['horizon']}; train the completions that were recorded (its rows.jsonl)"
                )
            told.append(answer)
        if self._head is None:
            assert self.top_k is not None
            return scored(told, batch, setting.vocabulary, self.top_k, str(self.path))
        return stated(told, batch, self._head)
