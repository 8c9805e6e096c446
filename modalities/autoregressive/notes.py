"""Notes on completions: what others of the group wrote, what the verifier says of it in words."""

from __future__ import annotations

from typing import Any

from ...note import Note
from ...reward import Reward
from ...trajectory import Trajectories


class Peers(Note):
    """Completions of the other rollouts of the same prompt, by their rewards: the columns ``right`` and ``wrong``.

    Each is a list of texts in the order of the group, for templates such as ``"{{ right[0] }}"``; None where there are
    fewer than asked for, so that a view that reads it has nothing to show.

    Args:
        right: how many that got a reward of ``threshold`` or more. Default 1 (SDPO, 2601.20802; MOPD, 2605.12652, shows
            two).
        wrong: how many that got less. Default 0 (MOPD shows one).
        threshold: default 0.5 (SDPO).
        own: whether a rollout counts among its own peers. Default False (SDPO's released code).
        drop: texts are cut in front of the last occurrence of this mark, and begin behind it, such as ``</think>``
            (SDPO shows no thinking). Default: nothing is cut.

    Raises:
        ValueError: nobody is to be shown, or fewer than none; when training begins: no rewards, or no group.
    """

    def __init__(
        self, right: int = 1, wrong: int = 0, threshold: float = 0.5, own: bool = False, drop: str = ""
    ) -> None:
        if min(right, wrong) < 0 or right + wrong == 0:
            raise ValueError(f"Peers: right={right} and wrong={wrong} show nobody; at least one is to be shown")
        self.right, self.wrong, self.threshold, self.own, self.drop = right, wrong, threshold, own, drop
        self.writes = tuple(name for name, count in (("right", right), ("wrong", wrong)) if count)

    def check(self, module: Any) -> None:
        if not module.has_rewards:
            raise ValueError("Peers tells right from wrong by the reward, and there is none: set model.reward")
        if module.rollout.group_size < 2 and not self.own:
            raise ValueError("Peers shows other rollouts of the same prompt: set rollout.group_size to 2 or more")

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        texts = module.completions(trajectories)
        if self.drop:
            texts = [text.rpartition(self.drop)[2].strip() for text in texts]
        group, reward = trajectories.group.tolist(), trajectories.reward
        assert reward is not None
        won = [None if value != value else value >= self.threshold for value in reward.tolist()]
        columns: dict[str, list[Any]] = {name: [] for name in self.writes}
        for i, prompt in enumerate(group):
            peers = [j for j, other in enumerate(group) if other == prompt and (self.own or j != i)]
            for name, outcome, count in (("right", True, self.right), ("wrong", False, self.wrong)):
                if count:
                    shown = [texts[j] for j in peers if won[j] is outcome][:count]
                    columns[name].append(shown if len(shown) == count else None)
        return trajectories.noted(columns)


class Feedback(Note):
    """What the verifier says of a completion in words (`Reward.feedback`): the column ``feedback``.

    None where it says nothing.

    Args:
        of: only about completions that got a reward below this. Default 0.5; None: about all.

    Raises:
        ValueError: when training begins: the reward says nothing in words.
    """

    writes = ("feedback",)

    def __init__(self, of: float | None = 0.5) -> None:
        self.of = of

    def check(self, module: Any) -> None:
        if module.reward is None or type(module.reward).feedback is Reward.feedback:
            raise ValueError(
                f"Feedback: model.reward ({type(module.reward).__name__}) says nothing in words; take a reward with a "
                "method feedback(completion, example), or CallableReward with `words`"
            )

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        rewards = [1.0] * len(trajectories) if trajectories.reward is None else trajectories.reward.tolist()
        texts = [
            None
            if self.of is not None and not value < self.of
            else module.scoring.words(module.reward, text, example | module.parsed(text, example))
            for text, example, value in zip(
                module.completions(trajectories), trajectories.examples, rewards, strict=True
            )
        ]
        return trajectories.noted({"feedback": texts})
