"""Notes: found out once about each rollout, read as columns, kept with what is not trained yet."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning.modalities.autoregressive import PromptView
from opd_lightning.note import Note, memories, needed_columns, remember
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.rollout import RolloutLoader
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Live, Teacher
from opd_lightning.trajectory import Trajectories
from tests.test_rollout import same, steps_of, train
from tests.tiny import LongerIsBetter, attach, fit, make_module, make_rows
from tests.worlds import World


class Numbered(Note):
    """A number that grows with every batch, of rollouts of more than one step."""

    remembers = ("count",)

    def __init__(self, writes: str = "number", reads: tuple[str, ...] = (), before_reward: bool = False) -> None:
        self.writes, self.columns, self.before_reward, self.count = (writes,), reads, before_reward, 0
        self.seen: list[Any] = []

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        self.count += 1
        self.seen.append((trajectories.reward, [[row[name] for name in self.columns] for row in trajectories.examples]))
        lengths = trajectories.length.tolist()
        return trajectories.noted({self.writes[0]: [f"{self.count}" if n > 1 else None for n in lengths]})


def told(notes: dict[str, Note], view: str = "{{ number }}{{ prompt }}", **settings: Any) -> dict[str, Any]:
    teachers = {"teacher": Teacher(Live(), PromptView(view), **settings)}
    return {"teacher": teachers, "notes": notes, "rollout": Rollout(batch_size=4, horizon=5)}


def loader_of(world: World, folder: Path, notes: dict[str, Note], **settings: Any) -> RolloutLoader:
    module = world.alone(notes=notes, rollout=Rollout(batch_size=4, horizon=5, **settings))
    return attach(module, folder).rollout_loader(world.make_rows(24))


def test_what_is_found_out_is_a_column_of_its_row(every_world, tmp_path):
    batch = next(train(loader_of(every_world, tmp_path, {"a": Numbered(), "b": Numbered("other", ("number",))})))
    lengths = batch.trajectories.length.tolist()
    expected = ["1" if n > 1 else None for n in lengths]
    assert [row["number"] for row in batch.trajectories.examples] == expected
    assert [row["other"] for row in batch.trajectories.examples] == expected
    assert all(row.location for row in batch.trajectories.examples), "rows stay rows"


def test_later_notes_read_earlier_ones_and_the_rewards(tiny_student, tmp_path):
    early, late = Numbered(before_reward=True), Numbered("other", ("number",))
    module = make_module(tiny_student, reward=LongerIsBetter(), **told({"late": late, "early": early}))
    fit(module, tmp_path, steps=1)
    assert early.seen[0][0] is None, "made before the rewards"
    assert late.seen[0][0] is not None
    assert [row[0] for row in late.seen[0][1]].count("1") > 0, "and before the note that reads it, wherever it stands"


def test_a_view_that_reads_a_note_is_on_where_there_is_something_to_say(tiny_student, tmp_path):
    module = make_module(tiny_student, **told({"note": Numbered()}))
    attach(module, tmp_path)
    batch = next(train(module.rollout_loader(make_rows(24)))).trajectories
    stream = module.streams.query("teacher", batch)
    assert stream.available.tolist() == [row["number"] is not None for row in batch.examples]
    assert module.streams.available(["teacher"], batch)["teacher"].tolist() == stream.available.tolist()
    assert "number" not in module.required_columns()


def test_columns_of_the_data_set_that_notes_read_are_required(tiny_student):
    notes = {"a": Numbered("first", ("answer",)), "b": Numbered("second", ("first", "task"))}
    assert needed_columns(notes) == {"answer": "model.notes.a", "task": "model.notes.b"}
    needed = make_module(tiny_student, **told(notes, "{{ second }}{{ prompt }}")).required_columns()
    assert needed["answer"] == "model.notes.a"
    assert "first" not in needed


def test_pending_batches_keep_their_notes_and_memory_goes_on(every_world, tmp_path):
    # 1. a checkpoint from the middle of the second generation batch of two optimizer steps
    before = Numbered()
    first = loader_of(every_world, tmp_path, {"a": before}, micro_batch_size=2)
    batches = train(first)
    for _ in range(3):
        next(batches)
    checkpoint = io.BytesIO()
    torch.save({"loader": first.state_dict(), "notes": memories({"a": before})}, checkpoint)
    done = steps_of(first).completed
    expected = [next(batches).trajectories for _ in range(2)]
    # 2. goes on as if nothing had been
    checkpoint.seek(0)
    saved, after = torch.load(checkpoint, weights_only=True), Numbered()
    remember({"a": after}, saved["notes"])
    again = loader_of(every_world, tmp_path, {"a": after}, micro_batch_size=2)
    steps_of(again).completed = done
    again.load_state_dict(saved["loader"])
    batches = train(again)
    for theirs in expected:
        mine = next(batches).trajectories
        same(mine, theirs)
        assert [row["number"] for row in mine.examples] == [row["number"] for row in theirs.examples]
    assert (before.count, after.count, len(after.seen)) == (3, 3, 1), "the pending batch was not asked about twice"


def test_notes_of_trajectories_that_others_replaced_are_made_again():
    def batch(texts: list[str]) -> Trajectories:
        count = len(texts)
        return Trajectories(
            {"x": torch.zeros(count, 1)}, torch.zeros(count, 2), torch.ones(count, 2).bool(),
            [{"prompt": text} for text in texts], torch.zeros(count).bool(), torch.zeros(count, 2),
        )  # fmt: skip

    noted = batch(["a", "b"]).noted({"note": ["x", None]})
    assert noted.notes == [{"note": "x"}, {"note": None}]
    put = noted.put(torch.tensor([1]), batch(["c"]), {})
    assert put.notes is None
    assert put.examples == [{"prompt": "a"}, {"prompt": "b"}]
    kept = Trajectories.concatenate([noted, noted.select(torch.tensor([1]))], {})
    assert [row["note"] for row in kept.examples] == ["x", None, None] == [note["note"] for note in kept.notes]
    restored = Trajectories.from_state_dict(noted.state_dict(), [{"prompt": "a"}, {"prompt": "b"}])
    same(restored, noted)
    assert restored.examples == noted.examples


def test_a_view_that_a_note_makes_too_long_is_off_and_counted(tiny_student, tmp_path):
    class Long(Numbered):
        def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
            return trajectories.noted({"number": ["1" * (3 if i % 2 else 30) for i in range(len(trajectories))]})

    module = make_module(tiny_student, **told({"note": Long()}, max_prompt_length=20))
    attach(module, tmp_path)
    batch = next(train(module.rollout_loader(make_rows(24)))).trajectories
    assert module.streams.query("teacher", batch).available.tolist() == [False, True] * 2
    assert module.recorded()["teacher/too_long"] == 0.5


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"a": Numbered("prompt")}, "model.notes.a writes the column 'prompt', which the setting has"),
        ({"a": Numbered(), "b": Numbered()}, "model.notes.b writes the column 'number', which model.notes.a has"),
    ],
)
def test_columns_that_are_taken_are_refused(tiny_student, notes, message):
    with pytest.raises(ValueError, match=message):
        make_module(tiny_student, **told(notes))


@pytest.mark.parametrize(
    ("text", "view", "why"),
    [
        ("\ud800", "{{ number }}{{ prompt }}", r"can't read what it is shown, '.ud800"),
        ("1", "{{ number + 1 }}{{ prompt }}", "can't read what it is shown, '.*TypeError"),
    ],
)
def test_a_note_that_a_teacher_cant_read_is_named_with_its_row(tiny_student, tmp_path, text, view, why):
    class Odd(Numbered):
        def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
            return trajectories.noted({"number": [text] * len(trajectories)})

    with pytest.raises(ValueError, match=rf"model.teachers.teacher {why}"):
        fit(make_module(tiny_student, **told({"note": Odd()}, view)), tmp_path)


def test_a_note_is_nothing_that_a_student_can_be_shown(tiny_student):
    with pytest.raises(
        ValueError, match=r"model\.student_view reads number, which notes write once the student has acted"
    ):
        make_module(tiny_student, **told({"note": Numbered()}), student_view=PromptView("{{ number }}{{ prompt }}"))


def test_what_a_note_must_not_do_is_said(tiny_student, tmp_path):
    class Taken(Numbered):
        writes = ("answer",)

    class Silent(Numbered):
        def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
            return trajectories

    class Odd(Numbered):
        def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
            return trajectories.noted({"number": [torch.zeros(1)] * len(trajectories)})

    cases = [
        (Numbered("answer"), "model.notes.note writes the column 'answer', which the data set has already"),
        (Silent(), "model.notes.note: Silent has not written 'number'"),
        (Odd(), "model.notes.note: Odd wrote .* only plain values"),
    ]
    for note, message in cases:
        view = "{{ " + note.writes[0] + " }}{{ prompt }}"
        with pytest.raises((ValueError, TypeError), match=message):
            fit(make_module(tiny_student, **told({"note": note}, view)), tmp_path)


def test_an_objective_without_notes_is_what_it_was(tiny_student, tmp_path):
    objective = Objective([Term(ReverseKL())])
    losses = []
    for notes in ({}, {"note": Numbered()}):
        module = make_module(
            tiny_student, {"teacher": Teacher(Live(), PromptView("1{{ prompt }}"))}, objective, notes=notes
        )
        losses.append(float(fit(module, tmp_path, steps=2).callback_metrics["train/loss/ReverseKL"]))
    assert losses[0] == losses[1]
