"""Playbook: lessons of failures that are kept over the run, and right completions of rows that were seen before."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..note import Note
from ..trajectory import Trajectories

TAG = re.compile(r"\[(\d+)\]\W*(helpful|harmful)", re.IGNORECASE)


class Playbook(Note):
    """Lessons of failures, kept over the run and the same on all ranks (RESD, 2605.12741).

    For each generation batch: entries that do no good leave; ``reflection`` is written, and may say ``[3] helpful`` or
    ``[3] harmful`` of the entry 3; then ``lesson`` is written, and each of its lines becomes an entry. Columns:

        playbook: the entries, each with its ``number``, its ``text``, how often it was called ``helpful`` and
            ``harmful``, and the batch of its last use, ``used``: for templates such as
            ``"{% for entry in playbook %}[{{ entry.number }}] {{ entry.text }}\\n{% endfor %}"``.
        attempt: the rollout's own text, a space where it is empty.
        solved: a right completion of the same row, of this batch or an earlier one; None where there was none.

    Every fourth batch (``every``) entries leave that were called harmful as often as helpful, and those that nobody
    used in more than one batch. Beyond ``most``, those leave that were not used for longest.

    Args:
        reflection: a note that writes about failures, such as `Written`; it may read the columns above, and
            ``feedback`` if that is made before.
        lesson: a note that writes new entries; it may read the reflection's column.
        success: a note whose text may tag entries, too, such as one about right rollouts. Default: none.
        most: entries that are kept. Default 200 (RESD).
        every: generation batches between two prunings. Default 4 (RESD).

    Raises:
        ValueError: a number below 1; when training begins: no rewards.
    """

    remembers = ("entries", "solutions", "batches", "numbered")

    def __init__(
        self, reflection: Note, lesson: Note, success: Note | None = None, most: int = 200, every: int = 4
    ) -> None:
        if min(most, every) < 1:
            raise ValueError(f"Playbook: most and every must be >= 1, got {most} and {every}")
        self.reflection, self.lesson, self.success, self.most, self.every = reflection, lesson, success, most, every
        self.entries: list[dict[str, Any]] = []
        self.solutions: dict[int, str] = {}
        self.batches = self.numbered = 0
        self._notes = [note for note in (reflection, success, lesson) if note is not None]
        self.writes = ("playbook", "attempt", "solved", *(column for note in self._notes for column in note.writes))
        self.sources = frozenset().union(*(note.sources for note in self._notes))
        read = dict.fromkeys(column for note in self._notes for column in note.columns)
        self.columns = tuple(column for column in read if column not in self.writes)

    def stand_in(self) -> dict[str, Any]:
        inside = {column: value for note in self._notes for column, value in note.stand_in().items()}
        entry = {"number": 1, "text": "‹playbook›", "helpful": 0, "harmful": 0, "used": 0}
        return super().stand_in() | inside | {"playbook": [entry]}

    def check(self, module: Any) -> None:
        if not module.has_rewards:
            raise ValueError("Playbook tells failures by the reward, and there is none: set model.reward")
        for note in self._notes:
            note.check(module)

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        # 1. what is known before anything is written
        if self.batches and self.batches % self.every == 0:
            self._prune()
        texts = module.completions(trajectories)
        solved = self._solved(module, trajectories, texts)
        trajectories = trajectories.noted({"attempt": [text or " " for text in texts], "solved": solved})
        trajectories = self._shown(trajectories)
        # 2. reflections, which may say what an entry was good for
        for note in self._notes[:-1]:
            trajectories = note(module, trajectories)
            for text in self._everywhere(module, trajectories, note):
                self._tag(text)
        # 3. lessons, from the playbook as it is then
        trajectories = self.lesson(module, self._shown(trajectories))
        for text in self._everywhere(module, trajectories, self.lesson):
            self._learn(text)
        if len(self.entries) > self.most:
            self._prune()
        self.batches += 1
        module.record("playbook/entries", float(len(self.entries)))
        return self._shown(trajectories)

    def _shown(self, trajectories: Trajectories) -> Trajectories:
        entries = [dict(entry) for entry in self.entries]  # it is as it was then, whatever becomes of the entries
        return trajectories.noted({"playbook": [entries] * len(trajectories)})

    @staticmethod
    def _everywhere(module: Any, trajectories: Trajectories, note: Note) -> Iterable[str]:
        """Yields what was written on all ranks, in the order of the generation batch."""
        own = [row[column] for row in trajectories.examples for column in note.writes if row[column]]
        return (text for texts in module.ranks.gather_objects(own) for text in texts)

    def _solved(self, module: Any, trajectories: Trajectories, texts: list[str]) -> list[str | None]:
        """Remembers right completions; returns one for each trajectory, its own if it is right."""
        assert trajectories.reward is not None
        rows, right = trajectories.row.tolist(), (trajectories.reward >= 0.5).tolist()
        first: dict[int, str] = {}
        for row, text, is_right in zip(rows, texts, right, strict=True):
            if is_right:
                first.setdefault(row, text)
        for of_rank in module.ranks.gather_objects(first):
            self.solutions.update(of_rank)
        known = [self.solutions.get(row) for row in rows]
        return [text if is_right else other for text, is_right, other in zip(texts, right, known, strict=True)]

    def _tag(self, text: str) -> None:
        called = {int(number): verdict.lower() for number, verdict in TAG.findall(text)}
        for entry in self.entries:
            if (verdict := called.get(entry["number"])) is not None:
                entry[verdict] += 1
                entry["used"] = self.batches

    def _learn(self, text: str) -> None:
        for line in filter(None, map(str.strip, text.splitlines())):
            self.numbered += 1
            fresh = {"number": self.numbered, "text": line, "helpful": 0, "harmful": 0, "used": self.batches}
            self.entries.append(fresh)

    def _prune(self) -> None:
        self.entries = [entry for entry in self.entries if not self._is_of_no_use(entry)]
        if (over := len(self.entries) - self.most) > 0:
            longest = sorted(self.entries, key=lambda entry: (entry["used"], entry["number"]))[:over]
            self.entries = [entry for entry in self.entries if entry not in longest]

    def _is_of_no_use(self, entry: dict[str, Any]) -> bool:
        helpful, harmful = entry["helpful"], entry["harmful"]
        if not helpful and not harmful:
            return bool(self.batches - entry["used"] > 1)
        return bool(harmful >= helpful)
