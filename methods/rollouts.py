"""Callbacks that let policies act besides the rollouts, and put what they did in the place of some.

Shape legend: B trajectories, K of them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..callback import DistillationCallback
from ..distribution import CategoricalChunk
from ..module import OnPolicyDistillation
from ..objective import OpenSteps
from ..rollout_settings import derived_seed
from ..trajectory import Trajectories

INSERTED, REWRITTEN, JUDGED, HINTED, ANOTHER = 7001, 7002, 7003, 7901, 7902
"""Which further draw of a trajectory's seed (`derived_seed`) each callback acts with."""


def acted(module: OnPolicyDistillation, who: str, trajectories: Trajectories, index: Tensor, draw: int) -> Trajectories:
    """Lets a policy act on the prompts of the trajectories ``index [K]``, with further draws of their seeds."""
    seeds = [derived_seed(int(trajectories.seed[i]), draw) for i in index]
    return module.act(who, [trajectories.examples[i] for i in index], seeds).to("cpu")


class InsertSuccess(DistillationCallback):
    """Puts a right rollout of a better policy into groups that hardly succeed (NPO, 2604.20733).

    Where a group's mean reward is at most ``gate``, the policy acts once; if it is right, it takes the place of the
    group's last wrong member, with an importance ratio of 1. The group's statistics are those after that. Logged:
    ``train/insert_success/inserted``, the share of groups.

    Args:
        by: who acts, an entry of ``model.teachers``: NPO's is a checkpoint of the same run, 20 to 70 steps later.
        gate: highest mean reward of a group that is helped. Default 0 (ours: NPO's was not found).

    Raises:
        ValueError: when training begins: no rewards, no groups, or no such policy.
    """

    def __init__(self, by: str = "teacher", gate: float = 0.0) -> None:
        self.by, self.gate = by, gate

    @property
    def sources(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self.by})

    def check(self, module: OnPolicyDistillation) -> None:
        if not module.has_rewards or module.rollout.group_size < 2:
            raise ValueError("InsertSuccess looks at the rewards of groups: set model.reward, rollout.group_size > 1")

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        assert trajectories.reward is not None
        assert trajectories.group_mean is not None
        # 1. one wrong member of each group that hardly succeeds
        groups = trajectories.group.unique()
        places = []
        for group in groups:
            wrong = (trajectories.group == group) & (trajectories.reward < 0.5)
            if bool(wrong.any()) and float(trajectories.group_mean[wrong][0]) <= self.gate:
                places.append(int(wrong.nonzero()[-1]))
        # 2. whoever is better acts on their prompts, on every rank
        index = torch.tensor(places or [0])
        better = module.actor.with_rewards(acted(module, self.by, trajectories, index, INSERTED))
        assert better.reward is not None
        right = (better.reward >= 0.5) & bool(places)
        module.record("insert_success/inserted", float(right.sum()) / len(groups))
        if not bool(right.any()):
            return trajectories
        # 3. unknown log-probs of acting are those of the student as it is when it is trained: a ratio of 1
        unknown = torch.full_like(better.behavior_log_probs, torch.nan)
        chosen = replace(better, behavior_log_probs=unknown).select(right.nonzero().squeeze(-1))
        return trajectories.put(index[right], chosen, module.padding)


class Rewrite(DistillationCallback):
    """Trains on what a policy makes of the student's rollouts: neither quite its own nor given (MPD, 2605.08776).

    The policy is shown the prompt and the student's draft, and writes it anew; the student is trained as if it had
    been asked the prompt alone. Rewards are those of what was written.

    Args:
        prompt: what it is asked, with ``{prompt}`` and ``{draft}``. Where the prompt is a chat, this takes the place
            of its last message. MPD asks for the same reasoning in fewer words; its own text was not found.
        by: who writes, an entry of ``model.teachers`` (default ``teacher``) or ``student``.

    Raises:
        ValueError: a prompt without ``{draft}``; when training begins, no such policy; a chat whose last message is no
            text.
    """

    def __init__(self, prompt: str, by: str = "teacher") -> None:
        if "{draft}" not in prompt:
            raise ValueError("Rewrite.prompt: whoever rewrites has to see what: name {draft} in it")
        self.prompt, self.by = prompt, by

    @property
    def sources(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self.by})

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        _, rows = module.actor.checked_rewards(trajectories)
        examples = [
            {**example, "prompt": self.asked(example["prompt"], str(row["completion"]))}
            for example, row in zip(trajectories.examples, rows, strict=True)
        ]
        seeds = [derived_seed(int(seed), REWRITTEN) for seed in trajectories.seed]
        rewritten = module.act(self.by, examples, seeds).to("cpu")
        # the student reads its own prompt, and not what the other was asked
        rewritten = replace(rewritten, observation=trajectories.observation)
        return trajectories.put(torch.arange(len(trajectories)), rewritten, module.padding)

    def asked(self, prompt: Any, draft: str) -> Any:
        """Writes the prompt of whoever rewrites: a text, or a chat with another last message."""
        if isinstance(prompt, str):
            # in one pass: what a prompt says of {draft} is left alone
            return re.sub(r"\{(prompt|draft)\}", lambda found: prompt if found[1] == "prompt" else draft, self.prompt)
        *before, last = prompt
        if not isinstance(last["content"], str):
            raise ValueError("Rewrite asks for texts: the last message of a chat has parts that are none")
        return [*before, {**last, "content": self.asked(str(last["content"]), draft)}]


class PassRates(DistillationCallback):
    """Weighs trajectories by p^easy·(1 − p)^hard, p from rollouts made for that alone (PACED, 2603.11178).

    Prompts that are always or never solved weigh 0, and so do those whose rewards all abstain. The weight `PassRate`
    takes p from the group that is trained, at no cost. Logged: ``train/pass_rates/rate``.

    Args:
        rollouts: for each prompt, which are not trained. Default 8 (ours: PACED's number was not found).
        easy, hard: the exponents. Default 1 and 1 (PACED).

    Raises:
        ValueError: a number out of range; when training begins: no rewards.
    """

    def __init__(self, rollouts: int = 8, easy: float = 1.0, hard: float = 1.0) -> None:
        if rollouts < 1 or min(easy, hard) <= 0:
            raise ValueError(f"PassRates: rollouts={rollouts} must be >= 1, easy={easy} and hard={hard} > 0")
        self.rollouts, self.easy, self.hard = rollouts, easy, hard

    @property
    def sources(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"student"})

    def check(self, module: OnPolicyDistillation) -> None:
        if not module.has_rewards:
            raise ValueError("PassRates counts what is right: set model.reward")

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        groups, member = trajectories.group.unique(return_inverse=True)
        first = torch.stack([(member == group).nonzero()[0, 0] for group in range(len(groups))])
        rewards = []
        for draw in range(self.rollouts):
            reward, _ = module.actor.checked_rewards(acted(module, "student", trajectories, first, JUDGED + draw))
            assert reward is not None
            rewards.append(reward)
        rate = torch.stack(rewards).nanmean(0).clamp(0, 1)
        module.record("pass_rates/rate", rate[~rate.isnan()])
        weight = (rate**self.easy * (1 - rate) ** self.hard).nan_to_num()
        return replace(
            trajectories, weight=weight[member] * (1 if trajectories.weight is None else trajectories.weight)
        )


class BestOfTeacher(DistillationCallback):
    """Replaces each rollout of a teacher by the best of several: a right one, like the student's (BRTS, 2605.09725).

    Among right candidates the one that is most like the student's rollouts is taken. Where none is right a teacher that
    is shown a hint acts, whose rollout is taken if it is right; otherwise the most similar candidate is. Similar is the
    share of a candidate's tokens that are among the student's ``likeliest`` ids at the same place of its own rollout,
    as in BRTS's code, on average over the student's rollouts of the prompt (ours). Logged are
    ``train/best_of_teacher/right``, ``…/hinted`` and ``…/none_right``, shares of the prompts.

    Args:
        count: candidates for each, the rollout that is there among them. Default 2 (BRTS's script).
        teacher: the entry of ``model.teachers`` whose rollouts they are; it has a place in ``rollout.members``.
        hinted: the entry that is shown a hint. None: nobody.
        likeliest: default 16 (BRTS).

    Raises:
        ValueError: a number out of range; when training begins: no rewards, no vocabulary, no such policy, or one that
            has no place in a group beside the student.
    """

    def __init__(
        self, count: int = 2, teacher: str = "teacher", hinted: str | None = None, likeliest: int = 16
    ) -> None:
        if min(count, likeliest) < 1:
            raise ValueError(f"BestOfTeacher: count={count} and likeliest={likeliest} must be >= 1")
        self.count, self.teacher, self.hinted, self.likeliest = count, teacher, hinted, likeliest

    @property
    def sources(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self.teacher} if self.hinted is None else {self.teacher, self.hinted})

    def check(self, module: OnPolicyDistillation) -> None:
        if not module.has_rewards or "categorical" not in module.provides:
            raise ValueError("BestOfTeacher looks for right rollouts of ids: set model.reward, in a setting with ids")
        if not {"student", self.teacher} <= set(module.rollout.members or ()):
            raise ValueError(
                f"BestOfTeacher: rollout.members has to name student and {self.teacher}, such as "
                f"{{student: 2, {self.teacher}: 1}}; it is {module.rollout.members}"
            )

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        # 1. candidates, those that are there first
        assert trajectories.reward is not None
        places = (trajectories.source == trajectories.sources.index(self.teacher)).nonzero().squeeze(-1)
        candidates, rewards = [trajectories.select(places)], [trajectories.reward[places]]
        for draw in range(self.count - 1):
            candidates.append(acted(module, self.teacher, trajectories, places, ANOTHER + draw))
            rewards.append(self._rewards(module, candidates[-1]))
        # 2. the most similar one, of the right ones where there are any
        right = torch.stack(rewards) >= 0.5
        alike = self.likeness(module, trajectories, places, candidates)
        chosen = (alike + 2.0 * right).argmax(0)
        some_right = right.any(0)
        # 3. others take their places
        hinted = self._hinted(module, trajectories, places, some_right)
        for draw in range(1, self.count):
            trajectories = self._put(trajectories, places, candidates[draw], chosen == draw, module)
        if hinted is not None:
            trajectories = self._put(trajectories, places[~some_right], *hinted, module)
        # 4. how it went
        saved = torch.zeros_like(some_right)
        if hinted is not None:
            saved[~some_right] = hinted[1]
        for name, where in {"right": some_right, "hinted": saved, "none_right": ~(some_right | saved)}.items():
            module.record(f"best_of_teacher/{name}", where.double())
        return trajectories

    def likeness(
        self, module: OnPolicyDistillation, trajectories: Trajectories, places: Tensor, candidates: list[Trajectories]
    ) -> Tensor:
        """Returns each candidate's share of tokens that the student finds likely there, ``[candidates, places]``."""
        own = trajectories.select((trajectories.source == trajectories.sources.index("student")).nonzero().squeeze(-1))
        ids: list[Tensor] = []

        def read(steps: OpenSteps) -> Tensor:
            assert isinstance(steps.student, CategoricalChunk)
            likely = steps.student.known()[0].topk(self.likeliest).indices
            ids.append(likely.cpu())
            return likely[:, 0]

        module.per_step(own, read)
        likely = torch.full((*own.mask.shape, self.likeliest), -1)
        likely[own.mask] = torch.cat(ids)  # steps are read in their order
        rows = []
        for candidate in candidates:
            width = min(candidate.mask.shape[1], own.mask.shape[1])
            shares = []
            for i, group in enumerate(trajectories.group[places]):
                of_prompt = likely[own.group == group][:, :width]
                inside = (of_prompt == candidate.actions[i, None, :width, None]).any(-1) & candidate.mask[i, :width]
                shares.append(inside.sum(1).double().mean() / candidate.mask[i].sum().clamp(min=1))
            rows.append(torch.stack(shares))
        return torch.stack(rows)

    def _hinted(
        self, module: OnPolicyDistillation, trajectories: Trajectories, places: Tensor, some_right: Tensor
    ) -> tuple[Trajectories, Tensor] | None:
        """Rollouts with a hint where nobody was right, and which of them are right; None: nobody needs or gives one."""
        if self.hinted is None:
            return None
        # every rank acts, also one on which all have a right one
        index = places[~some_right]
        hinted = acted(module, self.hinted, trajectories, index if len(index) else places[:1], HINTED)
        return (hinted, self._rewards(module, hinted) >= 0.5) if len(index) else None

    @staticmethod
    def _rewards(module: OnPolicyDistillation, acted: Trajectories) -> Tensor:
        reward, _ = module.actor.checked_rewards(acted)
        assert reward is not None
        return reward

    def _put(
        self,
        trajectories: Trajectories,
        places: Tensor,
        candidates: Trajectories,
        where: Tensor,
        module: OnPolicyDistillation,
    ) -> Trajectories:
        """Puts the candidates ``where`` into their places, as the teacher's."""
        if not bool(where.any()):
            return trajectories
        chosen = candidates.select(where.nonzero().squeeze(-1))
        of_teacher = replace(chosen, source=torch.zeros_like(chosen.source), sources=(self.teacher,))
        return trajectories.put(places[where], of_teacher, module.padding)
