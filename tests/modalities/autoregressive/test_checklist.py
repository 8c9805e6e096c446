"""Checklist: passed or not, and in which words."""

from __future__ import annotations

import pytest

from opd_lightning.modalities.autoregressive import Checklist
from opd_lightning.reward import ExactMatch, Mentions, Reward


class Abstains(Reward):
    columns = ("other",)

    def __call__(self, completion, example):
        return None


def test_it_says_what_is_not_passed():
    judge = Checklist({"It is wrong.": ExactMatch(after="#"), "It names nothing.": Mentions()})
    cases = [("#6", 1.0, None), ("6", 0.0, "It is wrong."), ("#7", 0.0, "It is wrong. It names nothing.")]
    for completion, reward, words in cases:
        assert judge(completion, {"answer": "6"}) == reward
        assert judge.feedback(completion, {"answer": "6"}) == words
    assert judge.columns == ("answer",)


def test_it_abstains_with_any_of_its_checks():
    judge = Checklist({"wrong": ExactMatch(), "unknown": Abstains()})
    assert judge("7", {"answer": "6"}) is None
    assert judge.feedback("7", {"answer": "6"}) == "wrong"
    assert judge.columns == ("answer", "other")
    with pytest.raises(ValueError, match=r"Checklist\.checks is empty"):
        Checklist({})
