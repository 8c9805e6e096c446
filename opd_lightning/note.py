"""Notes: what is found out about rollouts before they are trained, for views, rewards and weights to read.

A note is written into the row of its trajectory, as one more column: whoever reads columns of the data set reads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from .callback import Stateful
from .printable import quoted
from .rows import TOO_LONG, BrokenPart
from .trajectory import Example, Trajectories

PLAIN = (str, int, float, bool, type(None))


class Note(Stateful, ABC):
    """Something that is found out about each trajectory of a generation batch.

    Every rank is called at the same time, once for each generation batch, when it is about to be trained. What is
    written is in the checkpoint, so a resumed run does not find it out again. A note with a memory names it in
    ``remembers``, keeps it the same on all ranks (``module.ranks.gather_objects``), and it is in the checkpoint, too.
    """

    columns: tuple[str, ...] = ()
    """Columns that it reads, of the data set or of earlier notes."""
    writes: tuple[str, ...] = ()
    """Columns that it writes: text, numbers, or lists and dicts of them; None where there is nothing to say."""
    channels: tuple[str, ...] = ()
    """Channels of the trajectories that it fills: values ``[B, T, ...]`` of every step."""
    before_reward: bool = False
    """Whether it is made before the rewards, which may then read it; otherwise it may read the rewards."""
    sources: frozenset[str] = frozenset()
    """Policies that it lets act."""

    def stand_in(self) -> dict[str, Any]:
        """Returns what the table of the first row shows for each column, where nothing is found out yet."""
        return {column: f"‹{column}›" for column in self.writes}

    def check(self, module: Any) -> None:
        """Refuses what cannot work: called once, before training.

        Raises:
            ValueError: what is missing, by its key.
        """

    @abstractmethod
    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        """Returns the generation batch with what was found out: ``trajectories.noted({column: B values})``.

        Args:
            module: the setting that trains (an `OnPolicyDistillation`).
            trajectories: on the CPU. What it knows of each step goes into their ``channels``.
        """


def check_notes(notes: Mapping[str, Note], columns: set[str], module: Any) -> None:
    """Refuses notes that can't be written.

    Args:
        notes: by name, in the order in which they are made.
        columns: that mean something to the setting already.
        module: the setting that trains.

    Raises:
        ValueError: two notes write the same column, or one writes a column of the setting's, or one that the student is
            to be shown; or as in `Note.check`.
    """
    writers: dict[str, str] = dict.fromkeys(columns, "the setting")
    for name, note in notes.items():
        if not note.writes:
            raise ValueError(f"model.notes.{name}: {type(note).__name__} names no column in `writes`")
        for column in note.writes:
            if column in writers:
                raise ValueError(f"model.notes.{name} writes the column {column!r}, which {writers[column]} has")
            writers[column] = f"model.notes.{name}"
        note.check(module)
    view = module.student_view
    if found_out := sorted(written_by(notes) & {*(view.columns if view else ())}):
        raise ValueError(
            f"model.student_view reads {', '.join(found_out)}, which notes write once the student has acted; "
            "show it to a teacher"
        )


def needed_columns(notes: Mapping[str, Note]) -> dict[str, str]:
    """Lists the columns that the data set must have for notes, each with the first note that needs it."""
    written: set[str] = set()
    needed: dict[str, str] = {}
    for name, note in notes.items():
        for column in note.columns:
            if column not in written:
                needed.setdefault(column, f"model.notes.{name}")
        written.update(note.writes)
    return needed


def written_by(notes: Mapping[str, Note]) -> set[str]:
    """Collects the columns that notes write."""
    return {column for note in notes.values() for column in note.writes}


def stand_ins(notes: Mapping[str, Note], example: Example) -> Example:
    """Collects what stands for the columns of notes that a row lacks (`Note.stand_in`)."""
    columns = {column: value for note in notes.values() for column, value in note.stand_in().items()}
    return {column: value for column, value in columns.items() if column not in example}


def refuse_taken(notes: Mapping[str, Note], columns: Collection[str], where: str) -> None:
    """Raises ValueError where a note writes a column that the rows have already."""
    for name, note in notes.items():
        for column in note.writes:
            if column in columns:
                raise ValueError(
                    f"model.notes.{name} writes the column {column!r}, which {where} has already; "
                    f"`data.columns: {{given_{column}: {column}}}` gives that another name"
                )


def offered_by(notes: Mapping[str, Note]) -> set[str]:
    """Collects the columns and channels that notes fill, for the needs of parts."""
    return written_by(notes).union(*(note.channels for note in notes.values()))


def write(notes: Mapping[str, Note], before_reward: bool, module: Any, trajectories: Trajectories) -> Trajectories:
    """Makes the notes that come before the rewards, or those that come after them, in their order.

    Raises:
        BrokenPart: a note returned something else than the trajectories with its columns.
        ValueError: the data set has such a column already.
    """
    for name, note in notes.items():
        if note.before_reward is not before_reward:
            continue
        refuse_taken({name: note}, trajectories.examples[0], "the data set")
        noted = note(module, trajectories)
        _check_written(f"model.notes.{name}: {type(note).__name__}", note, noted)
        trajectories = noted
    return trajectories


def _check_written(who: str, note: Note, noted: Any) -> None:
    if not isinstance(noted, Trajectories):
        raise BrokenPart(f"{who} returned {quoted(noted)}; it has to return trajectories.noted({{column: values}})")
    for columns in noted.notes or [{}]:
        missing = [column for column in note.writes if column not in columns]
        odd = [column for column in note.writes if not _is_plain(columns.get(column))]
        if missing:
            raise BrokenPart(f"{who} has not written {missing[0]!r}, which it names in `writes`")
        if odd:
            raise BrokenPart(
                f"{who} wrote {quoted(columns[odd[0]])} as {odd[0]!r}; only plain values go into a checkpoint"
            )


def _is_plain(value: Any) -> bool:
    """Tells whether a checkpoint can hold a value."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return type(value) in PLAIN


def memories(notes: Mapping[str, Note]) -> dict[str, dict[str, Any]]:
    """Collects what notes remember, for a checkpoint."""
    return {name: note.state_dict() for name, note in notes.items()}


def remember(notes: Mapping[str, Note], saved: Mapping[str, dict[str, Any]]) -> None:
    """Restores what notes remembered; those that the checkpoint does not know begin anew."""
    for name, note in notes.items():
        note.load_state_dict(saved.get(name, {}))


def without_long_views(module: Any, trajectories: Trajectories) -> Trajectories:
    """Marks the trajectories whose notes make a teacher's prompt longer than it can read: there it has no view."""
    found_out = written_by(module.notes)
    told = [name for name, teacher in module.teachers.items() if teacher.view and found_out & {*teacher.view.columns}]
    if not told:
        return trajectories
    problems = [{name: module.problem_with_view(name, example) for name in told} for example in trajectories.examples]
    marked = [[name for name, problem in of_row.items() if problem is not None] for of_row in problems]
    for name in told:
        module.record(f"{name}/too_long", sum(name in names for names in marked) / len(marked))
    return trajectories.noted({TOO_LONG: marked})
