"""Notes on completions: what siblings wrote, what the verifier says in words, what a policy writes about them."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, Literal

from ...note import Note
from ...policy import View, shown_by
from ...reward import Reward
from ...rollout_settings import derived_seed
from ...sharding import is_sharded
from ...trajectory import Trajectories
from .models import bare, context_length


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
        prefix: of the names of both columns, where a second such note shows others.
        drop: texts are cut in front of the last occurrence of this mark, and begin behind it, such as ``</think>``
            (SDPO shows no thinking). Default: nothing is cut.
        extreme: those with the highest reward come first among the right ones, those with the lowest among the wrong
            ones (CEPO, 2605.19436). Default: no; rewards of 0 and 1 know no difference.

    Raises:
        ValueError: nobody is to be shown, or fewer than none; when training begins: no rewards, or no group.
    """

    def __init__(
        self,
        right: int = 1,
        wrong: int = 0,
        threshold: float = 0.5,
        own: bool = False,
        prefix: str = "",
        drop: str = "",
        extreme: bool = False,
    ) -> None:
        if min(right, wrong) < 0 or right + wrong == 0:
            raise ValueError(f"Peers: right={right} and wrong={wrong} show nobody; at least one is to be shown")
        self.threshold, self.own, self.drop, self.extreme = threshold, own, drop, extreme
        sides = {"right": (True, right), "wrong": (False, wrong)}
        self.sides = {f"{prefix}{name}": side for name, side in sides.items() if side[1]}
        self.writes = tuple(self.sides)

    def stand_in(self) -> dict[str, Any]:
        return {name: [f"‹{name}›"] * count for name, (_, count) in self.sides.items()}

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
            for name, (outcome, count) in self.sides.items():
                of_side = [j for j in peers if won[j] is outcome]
                if self.extreme:
                    of_side.sort(key=lambda j: float(reward[j]), reverse=outcome)
                siblings = [texts[j] for j in of_side[:count]]
                columns[name].append(siblings if len(siblings) == count else None)
        return trajectories.noted(columns)


class Feedback(Note):
    """Verifier's words about a completion (`Reward.feedback`): the column ``feedback``.

    None where it says nothing.

    Args:
        of: only about completions that got a reward below this. Default 0.5; None: about all.
        judge: who is asked instead of ``model.reward``, such as a `Checklist`, or a class of your own that asks a model
            (VISD, 2605.06094). Default: ``model.reward``.

    Raises:
        ValueError: when training begins: the reward, or the judge, says nothing in words; it is asked only about
            completions below a reward, and there are none.
    """

    writes = ("feedback",)

    def __init__(self, of: float | None = 0.5, judge: Reward | None = None) -> None:
        self.of, self.judge = of, judge
        self.columns = () if judge is None else judge.columns

    def check(self, module: Any) -> None:
        who, judge = ("model.reward", module.reward) if self.judge is None else ("its judge", self.judge)
        if judge is None or type(judge).feedback is Reward.feedback:
            raise ValueError(
                f"Feedback: {who} ({type(judge).__name__}) says nothing in words; take a reward with a "
                "method feedback(completion, example), or CallableReward with `words`"
            )
        if self.of is not None and not module.has_rewards:
            raise ValueError(
                f"Feedback asks about completions whose reward is below of={self.of}, and there are no rewards: set "
                "model.reward, or `of: null`, which asks about all"
            )

    def close(self) -> None:
        """Gives back what its judge holds."""
        judge: Any = self.judge
        if hasattr(judge, "close"):
            judge.close()

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        judge, texts = self.judge or module.reward, module.completions(trajectories)
        reward = trajectories.reward
        asked = [i for i in range(len(texts)) if self.of is None or (reward is not None and reward[i] < self.of)]
        examples = {i: trajectories.examples[i] | module.parsed(texts[i], trajectories.examples[i]) for i in asked}
        module.scoring.ahead(judge, [texts[i] for i in asked], [*examples.values()])
        words: list[str | None] = [None] * len(texts)
        for i in asked:
            words[i] = module.scoring.words(judge, texts[i], examples[i])
        if self.judge is not None:
            module.scoring.record(judge, "feedback", module.record)
        return trajectories.noted({"feedback": words})


class Written(Note):
    """Text that a policy writes about each rollout: a reflection, a plan, a critique.

    Args:
        view: what it is asked, from the columns of the row, earlier notes, and ``written``, the rollout's text. Where
            it shows nothing, nothing is written.
        by: who writes, with its weights of now: the student, or an entry of ``model.teachers``, which reads the view's
            prompt through its own view, if it has one.
        column: where it goes.
        horizon: most tokens that it writes. Default 256 (ours).
        temperature: default 1 (ours).
        about: only about rollouts that got a reward of ``threshold`` or more (``right``), or less (``wrong``).
        threshold: default 0.5.

    A prompt that leaves no room for the horizon in the writer's context is not asked.

    Raises:
        ValueError: another word than all, right or wrong; when training begins: an unknown policy, or no rewards to
            tell right from wrong by.
    """

    def __init__(
        self,
        view: View,
        by: str = "student",
        column: str = "reflection",
        horizon: int = 256,
        temperature: float = 1.0,
        about: Literal["all", "right", "wrong"] = "all",
        threshold: float = 0.5,
    ) -> None:
        if about not in ("all", "right", "wrong"):
            raise ValueError(f"Written.about is all, right or wrong, not {about!r}")
        self.view, self.by, self.horizon, self.temperature = view, by, horizon, temperature
        self.about, self.threshold = about, threshold
        self.writes, self.sources = (column,), frozenset({by})
        self.columns = tuple(name for name in view.columns if name != "written")

    def check(self, module: Any) -> None:
        if self.by not in {"student", *module.teachers}:
            raise ValueError(f"Written.by: there is no {self.by!r}; there are {['student', *sorted(module.teachers)]}")
        if self.about != "all" and not module.has_rewards:
            raise ValueError(f"Written.about={self.about} needs rewards, and there are none: set model.reward")

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        # 1. what it is asked, about whom
        texts = module.completions(trajectories)
        rows = [row | {"written": text} for row, text in zip(trajectories.examples, texts, strict=True)]
        asked = [shown_by(self.view, row, "Written.view") for row in rows]
        policy = module.policies[self.by]
        room = context_length(policy) - self.horizon
        chosen = [
            i
            for i, (wanted, row) in enumerate(zip(self._wanted(trajectories), asked, strict=True))
            if wanted and row is not None and len(module.prompt_ids(row, module.reads_as(policy))) <= room
        ]
        # 2. what it writes; ranks that share weights must all act
        acting = chosen or ([0] if is_sharded(bare(policy.model)) else [])
        written: list[str | None] = [None] * len(texts)
        if acting:
            rollout = dataclasses.replace(module.rollout, horizon=self.horizon, temperature=self.temperature)
            purpose = zlib.crc32(self.writes[0].encode())
            seeds = [derived_seed(seed, purpose) for seed in trajectories.seed[acting].tolist()]
            acted = module.act(self.by, [asked[i] or trajectories.examples[i] for i in acting], seeds, rollout)
            for i, text in zip(chosen, module.completions(acted), strict=False):
                written[i] = text or None
        return trajectories.noted({self.writes[0]: written})

    def _wanted(self, trajectories: Trajectories) -> list[bool]:
        if self.about == "all":
            return [True] * len(trajectories)
        assert trajectories.reward is not None
        won = trajectories.reward >= self.threshold
        known = ~trajectories.reward.isnan()
        return (known & (won if self.about == "right" else ~won)).tolist()
