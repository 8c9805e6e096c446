"""Callbacks that have students go on from what another policy wrote, or act as it was shown.

Shape legend: B trajectories, T steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..callback import DistillationCallback
from ..callbacks import KnobCallback
from ..callbacks.curriculum import Schedule
from ..module import OnPolicyDistillation
from ..objective.signal import ADVICE
from ..objective.steps import Steps
from ..objective.weight import Weight
from ..rollout_settings import derived_seed
from ..sharding import refuse_sharded
from ..trajectory import Trajectories

WENT_ON, GUIDED = 7201, 7401
"""Which further draws of a trajectory's seed (`derived_seed`) each callback acts with."""
AUTHOR = "author"
"""Channel ``[B, T]``: 1 where the teacher of `TeacherPrefix` wrote."""


class TeacherPrefix(KnobCallback):
    """Lets a teacher write the first l steps of each rollout and the student the rest, l by a schedule (2606.01249).

    TrOPD brings l from the rollouts' length to 0 along half a cosine. What the teacher wrote is trained, too, by the
    terms that have the weight `ByAuthor`; where it has ended by itself, the rollout is its own. Evaluation keeps its
    horizon.

    Args:
        length: l by optimizer steps done, such as ``Cosine(start=56, end=0, steps=200)``.
        by: the entry of ``model.teachers`` that writes; ``rollout.behavior`` names it and the student.

    Raises:
        ValueError: when training begins: nobody of that name acts, a setting that can't go on, an environment.
    """

    provides = frozenset({AUTHOR})

    def __init__(self, length: Schedule, by: str = "teacher") -> None:
        self.length, self.by = length, by

    @property
    def knobs(self) -> tuple[str, ...]:
        return ("rollout.horizon", f"rollout.behavior.{self.by}")

    def check(self, module: OnPolicyDistillation) -> None:
        if "turn" not in module.provides or getattr(module, "environment", None) is not None:
            raise ValueError("TeacherPrefix goes on behind tokens, in one turn: leave model.environment out")
        if {*module.rollout.behavior} != {self.by, "student"} or module.rollout.max_staleness:
            raise ValueError(
                f"TeacherPrefix: rollout.behavior has to name {self.by} and student, such as {{{self.by}: 1.0, "
                f"student: 0.0}}, and rollout.max_staleness must be 0; it is {module.rollout.behavior}"
            )
        self.longest = module.rollout.horizon
        super().check(module)

    def advance(self, module: OnPolicyDistillation) -> None:
        length = min(self.longest, round(self.length(module.global_step)))
        self.turn("rollout.horizon", length or self.longest)
        self.turn(f"rollout.behavior.{self.by}", float(length > 0))

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        # 1. the student goes on behind what the teacher wrote
        by_teacher = trajectories.source == trajectories.sources.index(self.by)
        prefix = torch.where(by_teacher, trajectories.extent, 0)
        (going,) = (by_teacher & ~trajectories.stopped & (prefix < self.longest)).nonzero(as_tuple=True)
        if len(going):
            seeds = [derived_seed(int(trajectories.seed[i]), WENT_ON) for i in going]
            continued = module.actor.go_on("student", trajectories.select(going), self.longest, seeds)
            trajectories = trajectories.put(going, continued, module.padding)
        # 2. who wrote what
        author = torch.arange(trajectories.mask.shape[1]) < prefix[:, None]
        module.record("teacher_prefix/share", author[trajectories.mask].double())
        return replace(trajectories, channels=trajectories.channels | {AUTHOR: author.float()})


class ByAuthor(Weight):
    """Weight 1 where the student wrote the step, 0 where the teacher of `TeacherPrefix` did.

    Args:
        teacher: the other way round, for the other term. Default: no.
    """

    scope = "data"
    needs = frozenset({AUTHOR})
    advice = ADVICE | {AUTHOR: "add the callback TeacherPrefix to trainer.callbacks"}

    def __init__(self, teacher: bool = False) -> None:
        self.teacher = teacher

    def __call__(self, steps: Steps) -> Tensor:
        by_teacher = steps.channel(AUTHOR)
        return by_teacher if self.teacher else 1 - by_teacher


class GuideHardGroups(DistillationCallback):
    """Rolls groups that never succeed out again, by the shortest part of a plan that helps (ActGuide-RL, 2605.12004).

    A group is hard if no member's reward is above 0. By bisection the smallest k is found with which one of ``probes``
    rollouts succeeds that were shown the first k actions of the plan (k may be 0, and is all of them where nothing
    helps). Then the whole group is rolled out with k, and trained without the plan: importance ratios have the
    log-probs of acting with it. Rewards and their statistics are those of the new rollouts. Logged:
    ``train/guide/hard``, the share of groups, and ``train/guide/actions``, k.

    Args:
        by: the entry of ``model.teachers`` that is shown the plan: the student's own weights (`Live`), with a view that
            names the column. The callback shortens that column of its rows, for this alone.
        column: the plan: a list of actions, or a text with ``separator`` between them.
        separator: default: a new line.
        probes: rollouts that are tried for each k. Default 2 (ActGuide-RL).
        rounds: of the bisection at most. Default 5 (ActGuide-RL).

    Raises:
        ValueError: a number out of range; when training begins: no rewards, no groups, or a strategy that shards the
            student.
    """

    def __init__(
        self,
        by: str = "guided",
        column: str = "actions",
        separator: str = "\n",
        probes: int = 2,
        rounds: int = 5,
    ) -> None:
        if min(probes, rounds) < 1:
            raise ValueError(f"GuideHardGroups: probes={probes} and rounds={rounds} must be >= 1")
        self.by, self.column, self.separator, self.probes, self.rounds = by, column, separator, probes, rounds

    @property
    def sources(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self.by})

    def check(self, module: OnPolicyDistillation) -> None:
        if not module.has_rewards or module.rollout.group_size < 2:
            raise ValueError("GuideHardGroups looks at the rewards of groups: set model.reward, rollout.group_size > 1")
        refuse_sharded(module.trainer, "GuideHardGroups", "which acts as often as each rank has hard groups")

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        assert trajectories.reward is not None
        # 1. groups that never succeed, and have a plan
        members = [(trajectories.group == group).nonzero().squeeze(1) for group in trajectories.group.unique()]
        hard = [index for index in members if not bool((trajectories.reward[index] > 0).any())]
        module.record("guide/hard", torch.tensor([len(hard) / len(members)]))
        hard = [index for index in hard if self.plan(trajectories.examples[int(index[0])])]
        if not hard:
            return trajectories
        # 2. how much of it each needs
        fewest = self.search(module, trajectories, [int(index[0]) for index in hard])
        module.record("guide/actions", torch.tensor(fewest, dtype=torch.double))
        # 3. all members act with that
        index = torch.cat(hard)
        lengths = [k for k, group in zip(fewest, hard, strict=True) for _ in group]
        guided = self._acted(module, trajectories, index.tolist(), lengths, GUIDED)
        return trajectories.put(index, guided, module.padding)

    def search(self, module: OnPolicyDistillation, trajectories: Trajectories, rows: list[int]) -> list[int]:
        """Bisects for the fewest actions with which a probe of each row succeeds."""
        low, high = [0] * len(rows), [len(self.plan(trajectories.examples[row])) for row in rows]
        for number in range(1, self.rounds + 1):
            active = [i for i in range(len(rows)) if low[i] < high[i]]
            if not active:
                break
            middle = [(low[i] + high[i]) // 2 for i in active]
            right = torch.zeros(len(active), dtype=torch.bool)
            for probe in range(self.probes):
                draw = GUIDED + number * self.probes + probe
                acted = self._acted(module, trajectories, [rows[i] for i in active], middle, draw)
                reward, _ = module.actor.checked_rewards(acted)
                assert reward is not None
                right |= reward > 0
            for i, k, succeeds in zip(active, middle, right.tolist(), strict=True):
                low[i], high[i] = (low[i], k) if succeeds else (k + 1, high[i])
        return low

    def plan(self, example: dict[str, Any]) -> list[Any]:
        """Lists the actions of a row's plan."""
        value = example.get(self.column)
        return value.split(self.separator) if isinstance(value, str) and value else list(value or [])

    def _acted(
        self, module: OnPolicyDistillation, trajectories: Trajectories, rows: list[int], lengths: list[int], draw: int
    ) -> Trajectories:
        """Rolls rows out by the guided policy, which is shown so many actions of each."""
        examples = [trajectories.examples[row] for row in rows]
        seeds = [derived_seed(int(trajectories.seed[row]), draw) for row in rows]
        acted = module.act(self.by, [self.shortened(*pair) for pair in zip(examples, lengths, strict=True)], seeds)
        return replace(acted.to("cpu"), examples=examples)

    def shortened(self, example: dict[str, Any], length: int) -> dict[str, Any]:
        """Returns the row with the first actions of its plan alone."""
        first = self.plan(example)[:length]
        return example | {self.column: self.separator.join(first) if isinstance(example[self.column], str) else first}
