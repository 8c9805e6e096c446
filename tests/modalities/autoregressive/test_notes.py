"""Notes on completions: siblings and the verifier's words, against what the texts and rewards say."""

from __future__ import annotations

import dataclasses
import zlib
from types import SimpleNamespace

import pytest
import torch

from opd_lightning.actor import Judging
from opd_lightning.callback import DistillationCallback
from opd_lightning.modalities.autoregressive import Feedback, FirstOf, Peers, PromptView, Written
from opd_lightning.note import Note
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.reward import CallableReward, ExactMatch
from opd_lightning.rollout_settings import Rollout, derived_seed
from opd_lightning.teacher import Live, Teacher
from tests.test_rollout import train
from tests.tiny import attach, fit, make_module, make_rows

PEERS = "tests.modalities.autoregressive.test_notes"


def even(completion: str, example: dict) -> float:
    """Right where the text is of even length; a rollout abstains now and then."""
    return float(len(completion) % 2 == 0)


def by_length(completion: str, example: dict) -> float:
    return len(completion) / 8


def in_words(completion: str, example: dict) -> str | None:
    return f"{len(completion)} is odd" if len(completion) % 2 else None


def at_length(completion: str, example: dict) -> str:
    return f"it has {len(completion)} signs"


@pytest.fixture
def rolled(every_text_world, tmp_path):
    """A generation batch of two groups of four, and its completions."""

    def get(**notes):
        reward = CallableReward(f"{PEERS}.even", words=f"{PEERS}.in_words")
        module = every_text_world.alone(
            notes=notes, reward=reward, rollout=Rollout(batch_size=2, group_size=4, horizon=6, micro_batch_size=8)
        )
        attach(module, tmp_path)
        batch = next(train(module.rollout_loader(every_text_world.make_rows(24)))).trajectories
        return batch, module.completions(batch)

    return get


@pytest.fixture(params=["text", "vision_language", "gui_grounding"])
def every_text_world(request, make_world):
    return make_world(request.param)


@pytest.mark.parametrize(("right", "wrong", "own"), [(1, 0, False), (2, 1, False), (1, 1, True)])
def test_peers_are_the_others_of_the_group_by_their_rewards(rolled, right, wrong, own):
    batch, texts = rolled(peers=Peers(right, wrong, own=own))
    for i, row in enumerate(batch.examples):
        others = [j for j in range(8) if batch.group[j] == batch.group[i] and (own or j != i)]
        for name, outcome, count in (("right", 1.0, right), ("wrong", 0.0, wrong)):
            shown = [texts[j].strip() for j in others if batch.reward[j] == outcome]
            if not count:
                assert name not in row
            elif len(shown) < count:
                assert row[name] is None
            else:
                assert [text.strip() for text in row[name]] == shown[:count]


def test_the_best_and_the_worst_may_come_first(tiny_student, tmp_path):
    """By the length of the text: the longest of the right ones, the shortest of the wrong ones."""
    module = make_module(
        tiny_student, {"teacher": Teacher(Live(), PromptView("{{ right[0] }}{{ prompt }}"))},
        notes={"peers": Peers(1, 1, extreme=True)}, reward=CallableReward(f"{PEERS}.by_length"),
        rollout=Rollout(batch_size=2, group_size=6, horizon=6),
    )  # fmt: skip
    attach(module, tmp_path)
    batch = next(train(module.rollout_loader(make_rows(24)))).trajectories
    texts = module.completions(batch)
    for i, row in enumerate(batch.examples):
        others = [j for j in range(12) if batch.group[j] == batch.group[i] and j != i]
        right = [j for j in others if batch.reward[j] >= 0.5]
        wrong = [j for j in others if batch.reward[j] < 0.5]
        assert row["right"] == ([texts[max(right, key=lambda j: len(texts[j]))]] if right else None)
        assert row["wrong"] == ([texts[min(wrong, key=lambda j: len(texts[j]))]] if wrong else None)


def test_what_they_thought_is_not_shown(rolled, monkeypatch):
    from opd_lightning.modalities.autoregressive import AutoregressiveDistillation

    spoken = [f"so </think> {'x' * (2 + 2 * (i % 2))}" for i in range(8)]
    monkeypatch.setattr(
        AutoregressiveDistillation, "completions", lambda self, trajectories: spoken[: len(trajectories)]
    )
    batch, _ = rolled(peers=Peers(drop="</think>"))
    shown = [row["right"] for row in batch.examples if row["right"]]
    assert shown
    assert all(text.strip("x") == "" for texts in shown for text in texts)


def test_the_verifiers_words_are_about_those_that_were_wrong(rolled):
    batch, texts = rolled(words=Feedback())
    for row, text, reward in zip(batch.examples, texts, batch.reward.tolist(), strict=True):
        assert row["feedback"] == (None if reward else in_words(text, row))


def test_a_judge_speaks_in_the_place_of_the_verifier(rolled):
    judge = CallableReward(f"{PEERS}.even", columns=("answer",), words=f"{PEERS}.at_length")
    batch, texts = rolled(words=Feedback(None, judge))
    assert [row["feedback"] for row in batch.examples] == [at_length(text, {}) for text in texts]
    assert Feedback(judge=judge).columns == ("answer",)


def test_what_a_policy_writes_is_what_it_writes_when_it_acts_on_the_view(tiny_student, tmp_path):
    view = PromptView("{{ written }}{{ prompt }}")
    note = Written(view, horizon=7, temperature=0.7, about="wrong")
    module = make_module(
        tiny_student, {"teacher": Teacher(Live(), PromptView("{{ reflection }}{{ prompt }}"))}, notes={"note": note},
        reward=CallableReward(f"{PEERS}.even"), rollout=Rollout(batch_size=8, horizon=6),
    )  # fmt: skip
    attach(module, tmp_path)
    batch = next(train(module.rollout_loader(make_rows(24)))).trajectories
    texts, rollout = module.completions(batch), dataclasses.replace(module.rollout, horizon=7, temperature=0.7)
    wrong = [i for i in range(8) if batch.reward[i] < 0.5]
    assert 0 < len(wrong) < 8
    for i in range(8):
        if i not in wrong:
            assert batch.examples[i]["reflection"] is None
            continue
        seed = derived_seed(int(batch.seed[i]), zlib.crc32(b"reflection"))
        alone = module.act("student", [view({**batch.examples[i], "written": texts[i]})], [seed], rollout)
        assert batch.examples[i]["reflection"] == (module.completions(alone)[0] or None)


def test_the_first_view_that_shows_anything_is_shown():
    view = FirstOf([PromptView("{{ right[0] }}|{{ prompt }}"), PromptView("{{ feedback }}?{{ prompt }}")])
    assert set(view.columns) == {"prompt", "right", "feedback"}
    cases = [((["a"], "b"), "a|x"), ((None, "b"), "b?x"), ((None, None), None)]
    for (right, feedback), expected in cases:
        shown = view({"prompt": "x", "right": right, "feedback": feedback})
        assert (None if shown is None else shown["prompt"]) == expected


def test_a_group_with_a_right_sibling_teaches_the_wrong_ones(tiny_student, tmp_path):
    teacher = Teacher(Live(), PromptView("{{ right[0] }}{{ prompt }}"))
    module = make_module(
        tiny_student, {"teacher": teacher}, Objective([Term(ReverseKL(), normalizer="on")]), notes={"peers": Peers()},
        reward=CallableReward(f"{PEERS}.even"), rollout=Rollout(batch_size=4, group_size=4, horizon=6),
    )  # fmt: skip
    trainer = fit(module, tmp_path, make_rows(24), steps=2)
    assert torch.isfinite(trainer.callback_metrics["train/loss/ReverseKL"])


@pytest.mark.parametrize(
    ("note", "settings", "message"),
    [
        (Peers(), {}, "Peers tells right from wrong by the reward"),
        (Peers(), {"reward": ExactMatch()}, "rollout.group_size to 2 or more"),
        (Feedback(), {"reward": ExactMatch()}, r"model.reward \(ExactMatch\) says nothing in words"),
        (Feedback(), {}, "says nothing in words"),
        (
            Feedback(judge=CallableReward(f"{PEERS}.even", words=f"{PEERS}.at_length")),
            {},
            "whose reward is below of=0.5, and there are no rewards",
        ),
        (Feedback(judge=ExactMatch()), {}, r"its judge \(ExactMatch\) says nothing in words"),
        (Written(PromptView("{{ written }}"), by="him"), {}, "there is no 'him'; there are"),
        (Written(PromptView("{{ written }}"), about="right"), {}, "Written.about=right needs rewards"),
    ],
)
def test_what_cannot_work_is_refused(tiny_student, note, settings, message):
    with pytest.raises(ValueError, match=message):
        make_module(
            tiny_student, {"teacher": Teacher(Live(), PromptView("1{{ prompt }}"))}, notes={"n": note}, **settings
        )


def test_peers_shows_somebody():
    with pytest.raises(ValueError, match="show nobody"):
        Peers(right=0)


def test_words_of_another_kind_are_an_error_of_the_reward(tiny_student, tmp_path):
    reward = CallableReward(f"{PEERS}.even", words=f"{PEERS}.even")
    module = make_module(
        tiny_student,
        {"teacher": Teacher(Live(), PromptView("{{ feedback }}{{ prompt }}"))},
        notes={"note": Feedback(None)},
        reward=reward,
    )
    with pytest.raises(RuntimeError, match=r"answered .* where words were asked for"):
        fit(module, tmp_path)


class Learning(Note):
    """Note that counts the generation batches that it knows of."""

    writes, remembers = ("batch",), ("batches",)

    def __init__(self) -> None:
        self.batches, self.calls = 0, 0

    def __call__(self, module, trajectories):
        self.batches, self.calls = self.batches + 1, self.calls + 1
        return trajectories.noted({"batch": [self.batches] * len(trajectories)})


class Replacing(DistillationCallback):
    def on_rollouts(self, module, trajectories):
        others = module.act("student", trajectories.examples[:1], [5]).to("cpu")
        return trajectories.put(torch.tensor([0]), others, module.padding)


def learning(student, folder, *callbacks):
    note = Learning()
    module = make_module(student, {"teacher": Teacher(Live())}, notes={"learning": note})
    attach(module, folder, callbacks=list(callbacks))
    return module, note, next(train(module.rollout_loader(make_rows(24)))).trajectories


def test_nothing_is_learned_twice_of_a_batch_in_which_others_were_put(tiny_student, tmp_path):
    _, note, batch = learning(tiny_student, tmp_path, Replacing())
    assert (note.calls, note.batches) == (2, 1)
    assert {row["batch"] for row in batch.examples} == {1}


def test_where_one_rank_makes_notes_anew_all_do(tiny_student, tmp_path):
    """A note may ask all ranks, which would wait for those that had nothing to put in its place."""
    module, note, batch = learning(tiny_student, tmp_path)
    others = [0.0]
    judged = Judging(module.actor, SimpleNamespace(total=lambda value: value + others[0]))
    batch = judged(batch.unjudged())
    assert judged(batch) is batch
    assert (note.calls, note.batches) == (2, 2)
    others[0] = 1.0
    assert {row["batch"] for row in judged(batch).examples} == {2}
    assert (note.calls, note.batches) == (3, 2)
