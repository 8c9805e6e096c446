"""ScriptedUser: an environment that plays a user by a script."""

from __future__ import annotations

from typing import Any

from ...environment import Environment, Turn
from ...trajectory import Example


class ScriptedUser(Environment):
    """User who says one line after another, and whose concerns a policy has to find the words for.

    The reward of a turn is the share of the concerns that it is the first to mention, in any case; an episode ends when
    all were, and behind the answer to the last line. Someone else's simulator has hidden concerns as well, and moods
    (SI-AVPO, 2605.22240): this one always says the same.

    Args:
        says: the lines, or the name of a column with a list of them, or with one.
        concerns: the column with the words to be mentioned, a list of texts or one of them; the student isn't shown it.

    Raises:
        ValueError: no line.
    """

    rewards = True

    def __init__(self, says: list[str] | str, concerns: str = "concerns") -> None:
        if not says:
            raise ValueError("ScriptedUser.says: there has to be a line, or the name of a column with some")
        self.says, self.concerns = says, concerns
        self.columns = (concerns, *([says] if isinstance(says, str) else []))

    def reset(self, row: Example, seed: int) -> Any:
        says = row[self.says] if isinstance(self.says, str) else self.says
        return {"says": _texts(says), "concerns": _texts(row[self.concerns]), "met": []}

    def step(self, state: Any, text: str) -> Turn:
        open_ = [concern for concern in state["concerns"] if concern not in state["met"]]
        met = [concern for concern in open_ if concern.lower() in text.lower()]
        reward = len(met) / max(1, len(state["concerns"]))
        if len(met) == len(open_) or not state["says"]:
            return Turn(state=state, done=True, reward=reward)
        line, *later = state["says"]
        return Turn(line, {**state, "says": later, "met": [*state["met"], *met]}, reward=reward)


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
