"""NoteGaps: how much each kind of note tells a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..callback import DistillationCallback
from ..module import OnPolicyDistillation
from ..objective import OpenSteps
from ..policy import View
from ..teacher import Elsewhere
from ..trajectory import Example, Trajectories


class WithoutColumns(View):
    """A view as if nothing had been found out for some columns; where it then shows nothing, the student's own row.

    Args:
        view: of a teacher.
        columns: that are emptied.
        module: the setting, which shows rows to the student.
        settings: of the student's view when it acted.
    """

    def __init__(self, view: View, columns: tuple[str, ...], module: Any, settings: dict[str, Any] | None) -> None:
        self.view, self.emptied, self.module, self.settings = view, columns, module, settings

    def __call__(self, example: Example) -> Example:
        row = self.view(example | dict.fromkeys(self.emptied))
        return self.module.shown([example], self.settings)[0] if row is None else row


class NoteGaps(DistillationCallback):
    """Logs how much likelier a teacher finds the rollout, and the right answer, with a note than without it.

    For every teacher and each note that its view reads: ``train/<teacher>/note_gap/<note>``, the mean over trained
    steps of log q(y | view) − log q(y | view without what this note wrote), in nats, and ``…/<note>/answer``, the same
    of the row's right answer, where it has one. A note that helps raises the second; one that raises the first alone
    repeats what was done. Rollouts that the note leaves the view of as it is count in neither.

    Each look costs two passes of the teacher over ``count`` rollouts and two over their answers, for each note.

    Example::

        callbacks+:
          - {class_path: NoteGaps, init_args: {count: 8}}

    Args:
        every: generation batches between looks, from the first on. Default 50.
        count: rollouts of each rank, at most; where another rank has fewer with such a note, as many. Default 8.
        answer: column of the right answer, such as ``completion`` (default) or ``solution``; rows where it is empty
            have none. None: no answers are looked at.

    Raises:
        ValueError: every or count < 1; when training begins: no teacher's view reads a note, or one that does was asked
            before, and knows nothing of its view without the note.
    """

    remembers = ("seen",)

    def __init__(self, every: int = 50, count: int = 8, answer: str | None = "completion") -> None:
        if min(every, count) < 1:
            raise ValueError(f"NoteGaps: every={every} and count={count} must be >= 1")
        self.every, self.count, self.answer, self.seen = every, count, answer, 0

    def check(self, module: OnPolicyDistillation) -> None:
        if not list(self._told(module)):
            raise ValueError("NoteGaps: no view of model.teachers reads what a note of model.notes writes")
        for name, *_ in self._told(module):
            weights = module.teachers[name].weights
            if isinstance(weights, Elsewhere) and weights.recorded:
                raise ValueError(f"NoteGaps: what model.teachers.{name} said was recorded, with its notes alone")

    @staticmethod
    def _told(module: OnPolicyDistillation) -> Iterator[tuple[str, View, str, tuple[str, ...]]]:
        """Yields each teacher and its view with each note that it reads, and what that writes."""
        for name, teacher in module.teachers.items():
            for noted, note in module.notes.items():
                if teacher.view is not None and set(teacher.view.columns) & set(note.writes):
                    yield name, teacher.view, noted, note.writes

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        if self.seen % self.every == 0:
            for teacher, view, note, columns in self._told(module):
                without = WithoutColumns(view, columns, module, trajectories.student_view)
                told = [
                    i
                    for i, example in enumerate(trajectories.examples)
                    if (look := module.teachers[teacher].look(example)) is not None
                    and not _same(look, without(example), columns)
                ]
                gap = f"{teacher}/note_gap/{note}"
                self._compare(module, gap, teacher, without, trajectories, told)
                if self.answer is not None:
                    answered = [i for i in told if trajectories.examples[i].get(self.answer)]
                    self._compare(module, f"{gap}/answer", teacher, without, trajectories, answered, self.answer)
        self.seen += 1
        return trajectories

    def _compare(
        self,
        module: OnPolicyDistillation,
        name: str,
        teacher: str,
        without: View,
        trajectories: Trajectories,
        places: list[int],
        answer: str | None = None,
    ) -> None:
        """Records the gap of some rollouts, or of their rows' answers."""
        # every rank asks as often: whose weights are cut can't answer alone
        places = places[: min(self.count, *module.ranks.gather_objects(len(places)))]
        if not places:
            return
        if answer is None:
            some = trajectories.select(torch.tensor(places))
        else:
            rows = [trajectories.examples[i] for i in places]
            some = module.act("dataset", [row | {"completion": row[answer]} for row in rows], places).to("cpu")
        gap = module.reader.per_step(some, _log_prob, teacher) - module.reader.per_step(
            some, _log_prob, teacher, without
        )
        module.record(name, gap[~gap.isnan()])


def _log_prob(steps: OpenSteps) -> Tensor:
    return steps.teacher.log_prob(steps.action)


def _same(one: Example, other: Example, but: tuple[str, ...]) -> bool:
    """Compares what two rows show, but for some columns; of images and the like only the same one is the same."""

    def equal(value: Any, its: Any) -> bool:
        return value is its or (isinstance(value, str | int | float | list | dict) and bool(value == its))

    return all(equal(value, other.get(column)) for column, value in one.items() if column not in but)
