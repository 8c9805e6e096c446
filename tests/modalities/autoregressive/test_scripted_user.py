"""A user by a script: its lines, its concerns, and that it ends."""

from __future__ import annotations

import pytest

from opd_lightning.environment import Episode
from opd_lightning.modalities.autoregressive import ScriptedUser
from opd_lightning.rollout_settings import Rollout

ROW = {"prompt": "?", "concerns": ["Price", "Warranty"], "lines": ["Hm.", "And?"]}


def play(user: ScriptedUser, row: dict, *texts: str) -> list[tuple[str, bool, float | None]]:
    episode = Episode(user, row, Rollout())
    return [(str(turn.observation), turn.done, turn.reward) for turn in map(episode.step, texts)]


def test_a_turn_is_worth_the_concerns_that_it_mentions_first():
    said = play(ScriptedUser("lines"), ROW, "The price is low.", "price, price", "and a warranty")
    assert said == [("Hm.", False, 0.5), ("And?", False, 0.0), ("", True, 0.5)]
    assert play(ScriptedUser("lines"), ROW, "price and warranty") == [("", True, 1.0)]


def test_lines_may_be_the_configurations_and_end_the_episode():
    user = ScriptedUser(["So?"], concerns="answer")
    assert user.columns == ("answer",)
    assert play(user, {"prompt": "1+1=", "answer": 2}, "3", "4") == [("So?", False, 0.0), ("", True, 0.0)]
    assert ScriptedUser("lines").columns == ("concerns", "lines")
    with pytest.raises(ValueError, match=r"ScriptedUser\.says: there has to be a line"):
        ScriptedUser([])
