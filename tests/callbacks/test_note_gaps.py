"""How much notes tell a teacher: against two plain passes, by kind of note, and that looking changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opd_lightning.callbacks import NoteGaps
from opd_lightning.modalities.autoregressive import FirstOf, Peers, PromptView
from opd_lightning.modalities.autoregressive.elsewhere.cached import Cached
from opd_lightning.note import Note
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Live, Teacher
from opd_lightning.trajectory import Trajectories
from tests.callbacks import toy
from tests.tiny import LongerIsBetter, attach, fit, make_module, make_rows


class Told(Note):
    """Something for every second rollout."""

    writes = ("told",)

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        return trajectories.noted({"told": ["12" if i % 2 else None for i in range(len(trajectories))]})


VIEW = FirstOf([PromptView("{{ told }}?{{ prompt }}"), PromptView("{{ right[0] }}?{{ prompt }}")])


def make(student, view=VIEW):
    return make_module(
        student, {"teacher": Teacher(Live(), view)}, notes={"told": Told(), "peers": Peers(own=True, threshold=0.0)},
        reward=LongerIsBetter(), rollout=Rollout(batch_size=8, horizon=6),
    )  # fmt: skip


def log_probs(module, batch, rows):
    """``[B, T]`` of the actions, with rows in place of the student's prompts, by a dense pass over each."""
    found = torch.full(batch.mask.shape, torch.nan, dtype=torch.float64)
    for i, row in enumerate(rows):
        one = batch.select(torch.tensor([i]))
        states = module.distribution(module.policies["teacher"], one, [row])
        for t in range(int(one.mask.sum())):
            state = states.at(torch.tensor([t]))
            found[i, t] = state.head(state.hidden).double().log_softmax(-1)[0, one.actions[0, t]].detach()
    return found


def test_each_note_is_compared_with_the_view_without_it(tiny_student, tmp_path):
    """Without the first note the second is shown in its place; the second is shown to half of them."""
    seen = []

    class Sees(NoteGaps):
        def on_rollouts(self, module, trajectories):
            seen.append(trajectories)
            return super().on_rollouts(module, trajectories)

    module, rows = make(tiny_student), make_rows(24)
    metrics = fit(module, tmp_path, rows, steps=1, callbacks=[Sees(every=1, count=8)]).callback_metrics
    (batch,), again = seen, make(tiny_student)
    attach(again, tmp_path)
    given = again.act("dataset", batch.examples, [0] * 8)
    for trajectories, name in ((batch, ""), (given, "/answer")):
        with_told, with_peers, plain = (
            log_probs(again, trajectories, [{**row, "prompt": show(row)} for row in batch.examples])
            for show in (
                lambda row: f"12?{row['prompt']}",
                lambda row: f"{row['right'][0]}?{row['prompt']}",
                lambda row: row["prompt"],
            )
        )
        odd = torch.arange(8) % 2 == 1
        known = trajectories.mask
        told = (with_told - with_peers)[odd[:, None] & known].mean()
        peers = (with_peers - plain)[~odd[:, None] & known].mean()
        assert float(metrics[f"train/teacher/note_gap/told{name}"]) == pytest.approx(float(told), abs=1e-5)
        assert float(metrics[f"train/teacher/note_gap/peers{name}"]) == pytest.approx(float(peers), abs=1e-5)


def test_another_column_holds_the_answer_and_some_rows_have_none(tiny_student, tmp_path):
    module = make(tiny_student)
    metrics = fit(module, tmp_path, steps=1, callbacks=[NoteGaps(every=1, count=2, answer="solution")]).callback_metrics
    assert torch.isfinite(metrics["train/teacher/note_gap/told/answer"])
    none = fit(make(tiny_student), tmp_path / "none", steps=1, callbacks=[NoteGaps(every=1, answer=None)])
    assert "train/teacher/note_gap/told/answer" not in none.callback_metrics


def test_looking_changes_nothing_and_only_every_so_often(tiny_student, tmp_path):
    plain, looked, gaps = make(tiny_student), make(tiny_student), NoteGaps(every=2)
    fit(plain, tmp_path / "plain", steps=3)
    looks = []
    gaps._compare = lambda *arguments: looks.append(gaps.seen) or NoteGaps._compare(gaps, *arguments)
    fit(looked, tmp_path / "looked", steps=3, callbacks=[gaps])
    for one, other in zip(plain.student.parameters(), looked.student.parameters(), strict=True):
        assert torch.equal(one, other)
    assert set(looks) == {0, 2}
    assert gaps.state_dict() == {"seen": 3}


def test_where_no_teacher_is_told_anything_it_is_refused(tiny_student, tmp_path):
    with pytest.raises(ValueError, match=r"no view of model\.teachers reads what a note"):
        fit(make(tiny_student, PromptView("1{{ prompt }}")), tmp_path, callbacks=[NoteGaps()])
    with pytest.raises(ValueError, match=r"no view of model\.teachers reads"):
        toy.fit(toy.make_module(), tmp_path, [NoteGaps()], 1)
    recorded = make(tiny_student)
    recorded.teachers["teacher"].weights = Cached.__new__(Cached)
    with pytest.raises(ValueError, match=r"what model\.teachers\.teacher said was recorded"):
        NoteGaps().check(recorded)
    with pytest.raises(ValueError, match="count=0"):
        NoteGaps(count=0)
