"""Notes of single papers, and a debate as MAD-OPD has it, against what each policy says when it is asked by hand."""

from __future__ import annotations

import dataclasses
import math
import zlib
from types import SimpleNamespace

import pytest
import torch

from opd_lightning.methods.note import Extremes, Measured, OtherPrompt, Stated
from opd_lightning.methods.noted import Confident
from opd_lightning.modalities.autoregressive import PromptView, Written
from opd_lightning.objective import LogLinear, Objective, ReverseKL, Term
from opd_lightning.pretrained import Pretrained
from opd_lightning.reward import ExactMatch, Mentions
from opd_lightning.rollout_settings import Rollout, derived_seed
from opd_lightning.scoring import Scoring
from opd_lightning.teacher import Frozen, Initial, Teacher
from tests.methods.world import World
from tests.objective.reference import batch, close
from tests.test_rollout import train
from tests.tiny import attach, fit, log_softmax, make_module, make_rows

ROUNDS = [PromptView("{{ prompt }}"), PromptView("{{ a_1 }} {{ b_1 }}?{{ prompt }}")]
TRANSCRIPT = "{{ a_1 }} {{ b_1 }} {{ a_2 }} {{ b_2 }}?{{ prompt }}"


def test_the_last_number_that_is_stated_counts():
    note = Stated({"sure": "text"})
    texts = ["<<CONFIDENCE=7>> or <<CONFIDENCE=87>>", "CONFIDENCE=3", None, "<<CONFIDENCE=0>>"]
    noted = note(None, batch([[1]] * 4, 3, examples=[{"text": text} for text in texts]))
    assert [row["sure"] for row in noted.examples] == [87.0, None, None, 0.0]
    assert (note.columns, note.writes) == (("text",), ("sure",))
    for pattern in ("(", "no group"):
        with pytest.raises(ValueError, match=r"Stated\.pattern|with one group"):
            Stated({"sure": "text"}, pattern)


def debating(student, teacher, **settings):
    notes = {
        f"{name}_{i + 1}": Written(ROUNDS[i], by=who, column=f"{name}_{i + 1}", horizon=6, temperature=0.7)
        for i in range(2)
        for name, who in (("a", "first"), ("b", "second"))
    }
    notes["sure"] = Stated({"sure_a": "a_2", "sure_b": "b_2"}, r"(\d\d?)\D*$")
    teachers = {
        "first": Teacher(Frozen(Pretrained(str(teacher))), PromptView(TRANSCRIPT)),
        "second": Teacher(Initial(), PromptView(TRANSCRIPT)),
    }
    terms = [
        Term(ReverseKL(), who, [Confident(of, ("sure_a", "sure_b"))], normalizer="trajectories")
        for who, of in (("first", "sure_a"), ("second", "sure_b"))
    ]
    return make_module(
        student, teachers, Objective(terms), notes=notes, rollout=Rollout(batch_size=6, horizon=6), **settings
    )


def test_two_teachers_debate_in_two_rounds(tiny_student, tiny_teacher, tmp_path):
    module = debating(tiny_student, tiny_teacher)
    attach(module, tmp_path)
    rolled = next(train(module.rollout_loader(make_rows(24)))).trajectories
    rollout = dataclasses.replace(module.rollout, horizon=6, temperature=0.7)
    # 1. each says in each round what it says when it is shown what both have said before
    for i, row in enumerate(rolled.examples):
        for turn, view in enumerate(ROUNDS, 1):
            for name, who in (("a", "first"), ("b", "second")):
                later = {"a_2", "b_2"} | ({"a_1", "b_1"} if turn == 1 else set())
                asked = {key: value for key, value in row.items() if key not in later}
                seed = derived_seed(int(rolled.seed[i]), zlib.crc32(f"{name}_{turn}".encode()))
                said = module.act(who, [view(asked)], [seed], rollout) if view(asked) else None
                assert row[f"{name}_{turn}"] == (said and (module.completions(said)[0] or None))
    # 2. both read all of it, where all four have something to say
    stream = module.streams.query("second", rolled)
    spoken = [all(row[column] for column in ("a_1", "b_1", "a_2", "b_2")) for row in rolled.examples]
    assert stream.available.tolist() == spoken
    assert any(spoken)
    # 3. the loss: for each rollout the mean over its steps of the two divergences, by their confidences
    total = 0.0
    for i in (i for i, all_spoke in enumerate(spoken) if all_spoke):
        one = rolled.select(torch.tensor([i]))
        row, mask = one.examples[0], one.mask[0]
        view = PromptView(TRANSCRIPT)(row)
        log_p = log_softmax(module, "student", one)[0].double()
        sure = [row["sure_a"], row["sure_b"]]
        raw = [1.0, 1.0] if None in sure else [math.exp(value / 100) for value in sure]
        for who, weight in zip(("first", "second"), raw, strict=True):
            log_q = log_softmax(module, who, one, [view])[0].double()
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
            total += weight / sum(raw) * divergence[mask].mean().item()
    streams = module.streams.query_all(["first", "second"], rolled)
    loss = module.objective(module.streams.student(rolled), streams, rolled).loss
    close(loss.detach(), torch.tensor(total / sum(spoken)), 1e-4)


def test_a_debate_that_nobody_noted_is_refused(tiny_student, tiny_teacher, tmp_path):
    module = debating(tiny_student, tiny_teacher, load=False)
    del module.notes["sure"]
    with pytest.raises(ValueError, match="Confident needs 'sure_a': name a note that writes this column"):
        fit(module, tmp_path)


def grouped(texts, rewards=None, group=None, **columns):
    rows = [{"text": text, **{name: values[i] for name, values in columns.items()}} for i, text in enumerate(texts)]
    facts = {"group": torch.tensor(group or [0] * len(texts)), "reward": torch.tensor(rewards or [0.0] * len(texts))}
    return batch([[1]] * len(texts), 3, examples=rows, **facts)


SETTING = SimpleNamespace(
    completions=lambda trajectories: [row["text"] for row in trajectories.examples],
    parsed=lambda text, row: {"answer": row["text"][:1]} if text.startswith("!") else {},
    scoring=Scoring(),
)


def test_metrics_are_measured_on_completions():
    note = Measured({"exact": ExactMatch(), "named": Mentions()})
    noted = note(SETTING, grouped(["6", "so 6", "!", "7"], answer=["6"] * 4))
    assert [(row["exact"], row["named"]) for row in noted.examples] == [(1, 1), (0, 1), (1, 1), (0, 0)]
    assert (note.writes, note.columns) == (("exact", "named"), ("answer",))
    with pytest.raises(ValueError, match=r"Measured\.metrics is empty"):
        Measured({})


def test_another_prompt_is_never_the_groups_own():
    rolled = grouped(["a"] * 5, group=[3, 3, 8, 8, 5], prompt=["x", "x", "y", "y", "z"])
    assert [row["another_prompt"] for row in OtherPrompt()(None, rolled).examples] == ["y", "y", "z", "z", "x"]
    alone = OtherPrompt()(None, rolled.select(torch.tensor([0, 1])))
    assert [row["another_prompt"] for row in alone.examples] == [None, None]


def test_extremes_of_a_group_are_shown_where_they_are_apart():
    rewards, groups = [0.5, 0.9, torch.nan, 0.1, 0.9, 0.5, 0.6, torch.nan], [0, 0, 0, 0, 0, 1, 1, 2]
    noted = Extremes(0.2)(SETTING, grouped([*"abcdefgh"], rewards, groups)).examples
    assert [(row["best"], row["worst"]) for row in noted] == [("b", "d")] * 5 + [(None, None)] * 3
    with pytest.raises(ValueError, match="Extremes compares the rewards of a group"):
        Extremes().check(SimpleNamespace(has_rewards=True, rollout=Rollout()))


def credit(share):
    """The term of CREDIT, without its support."""
    return Term(ReverseKL(), target=LogLinear({"teacher": 1.0, "contrast": -share}))


def test_credit_takes_off_what_the_text_makes_likelier_under_another_prompt():
    world = World(25, ("teacher", "contrast"))
    log_q, log_c = (world.log_probs(world.teachers[name]).detach() for name in ("teacher", "contrast"))

    def wanted(log_target):
        log_p = world.log_probs(world.student)
        divergence = (log_p.exp() * (log_p - log_target.log_softmax(-1))).sum(-1)
        return world.student.gradients(divergence[world.mask].mean())

    for ours, formula in zip(world.gradients(credit(0.3)), wanted(log_q - 0.3 * log_c), strict=True):
        close(ours, formula, 1e-5)
    for ours, plain in zip(world.gradients(credit(0.0)), world.gradients(Term(ReverseKL())), strict=True):
        close(ours, plain, 1e-6)
    # the same prompt in both places leaves 1 − λ of the teacher's
    world.teachers["contrast"] = world.teachers["teacher"]
    for ours, formula in zip(world.gradients(credit(0.3)), wanted(0.7 * log_q), strict=True):
        close(ours, formula, 1e-5)
