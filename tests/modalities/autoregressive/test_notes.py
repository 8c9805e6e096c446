"""Notes on completions: siblings and the verifier's words, against what the texts and rewards say."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.modalities.autoregressive import Feedback, Peers, PromptView
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.reward import CallableReward, ExactMatch
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Live, Teacher
from tests.test_rollout import train
from tests.tiny import attach, fit, make_module, make_rows

PEERS = "tests.modalities.autoregressive.test_notes"


def even(completion: str, example: dict) -> float:
    """Right where the text is of even length; a rollout abstains now and then."""
    return float(len(completion) % 2 == 0)


def in_words(completion: str, example: dict) -> str | None:
    return f"{len(completion)} is odd" if len(completion) % 2 else None


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
