"""Spans: which steps wrote what was marked, by whatever tokens, and never more than a share of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from opd_lightning.modalities.autoregressive import AgainstReference, Annotator, PromptView, Span, Spans
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Live, Teacher
from tests.objective.reference import batch
from tests.test_rollout import train
from tests.tiny import LongerIsBetter, attach, fit, make_module, make_rows

PIECES = ["", "ab", "c", " de", "f", "", "ghi"]


class Everything(Annotator):
    def __init__(self, *spans: Span) -> None:
        self.spans = list(spans)

    def __call__(self, completion, example, right):
        return [Span(0, len(completion), "all")] if not self.spans else self.spans


def written(tokens: list[int]) -> str:
    return "".join(PIECES[token] for token in tokens)


def noted(mask, actions, reward, note, **columns):
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(mask))]
    plain = batch(mask, len(PIECES), actions=torch.tensor(actions), examples=rows, reward=torch.tensor(reward))

    def completions(trajectories):
        kept = zip(trajectories.actions, trajectories.mask, strict=True)
        return [written(row[keep].tolist()) for row, keep in kept]

    return note(SimpleNamespace(completions=completions, written_as=written), plain)


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 1, [1, 0, 0, 0, 0, 0]),
        (1, 3, [1, 1, 0, 0, 0, 0]),
        (2, 3, [0, 1, 0, 0, 0, 0]),
        (4, 7, [0, 0, 1, 1, 0, 0]),
        (7, 10, [0, 0, 0, 0, 0, 1]),
        (0, 10, [1, 1, 1, 1, 1, 1]),
        (12, 14, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_a_step_is_marked_where_it_wrote_a_marked_character(start, stop, expected):
    """ "abc defghi", as ab, c, " de", f, nothing, ghi: what writes nothing is in where it is within."""
    spans = Spans(Everything(Span(start, stop, "x")), most=1.0)
    found = noted([[1] * 6], [[1, 2, 3, 4, 5, 6]], [1.0], spans)
    assert found.channels["spans"].tolist() == [expected]


def test_only_trained_steps_are_marked_and_never_more_than_a_share():
    mask, actions = [[0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], [[1, 1, 2, 3, 4]] * 3
    found = noted(mask, actions, [1.0, 0.0, torch.nan], Spans(Everything(), most=0.5))
    assert found.channels["spans"].tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0] * 5]
    assert [row["marked"] for row in found.examples] == ["all", "all", None], "where the reward abstains nothing is"
    few = noted([[1, 1, 1]], [[1, 2, 3]], [1.0], Spans(Everything()))
    assert few.examples[0]["marked"] is None, "a quarter of three steps is none"
    with pytest.raises(ValueError, match=r"Spans\.most must be in \(0, 1\], got 0"):
        Spans(Everything(), most=0)


def test_rules_mark_what_a_reference_has_not_and_key_steps():
    rules, row = AgainstReference(), {"solution": "1+2=3 4+5=9 #93"}
    assert rules("1+2=3 4+5=8 #83", row, right=False) == [Span(6, 15, "a wrong step")]
    assert rules("1+2=4  4+5=9 #93", row, right=False) == [Span(0, 5, "a wrong step")]
    assert rules("1+2=3 #93", row, right=False) == [], "what is missing was written by no step"
    assert rules("7", {"solution": ""}, right=False) == []
    assert rules("1+2=3 x", row, right=True) == [Span(3, 5, "a key step")]
    with pytest.raises(ValueError, match=r"AgainstReference\.key '\(' is not a regular expression"):
        AgainstReference(key="(")


def test_marks_follow_their_rollouts_and_are_made_again_for_others(tiny_student, tmp_path):
    teacher = {"teacher": Teacher(Live(), PromptView("{{ prompt }}"))}
    note = {"spans": Spans(Everything(), most=0.5)}
    settings = {"notes": note, "reward": LongerIsBetter(), "rollout": Rollout(batch_size=4, horizon=6)}
    module = make_module(tiny_student, teacher, Objective([Term(ReverseKL())]), **settings)
    attach(module, tmp_path)
    rolled = next(train(module.rollout_loader(make_rows(24)))).trajectories
    assert rolled.channels["spans"].sum(1).tolist() == [length // 2 for length in rolled.length.tolist()]
    others = module.act("student", rolled.examples[:1], [5])
    put = rolled.put(torch.tensor([0]), others, module.padding)
    assert "spans" not in put.channels
    again = module.actor.judged(put)
    assert again.channels["spans"].sum(1).tolist() == [length // 2 for length in again.length.tolist()]


def test_what_cannot_work_is_refused(tiny_student, tmp_path):
    from opd_lightning.methods.noted import Marked

    with pytest.raises(ValueError, match="Spans tells right from wrong by the reward, and there is none"):
        Spans(Everything()).check(SimpleNamespace(has_rewards=False))
    marked = Objective([Term(ReverseKL(), weights=[Marked()])])
    module = make_module(tiny_student, {"teacher": Teacher(Live(), PromptView("1{{ prompt }}"))}, marked, load=False)
    with pytest.raises(ValueError, match="Marked needs 'spans': name a note that fills this channel"):
        fit(module, tmp_path)
