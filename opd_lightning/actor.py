"""Actor: the policies that act, with their weights and settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .blend import BLEND
from .contract import check_acted, check_prompts, check_scores
from .note import memories, remember, without_long_views, write
from .policy import Acting, Policy, View
from .progress import phase
from .ranks import Ranks
from .rollout_settings import Rollout
from .rows import blames_rows
from .setting import Setting
from .sharding import gathered
from .student_view import settings_of, shown
from .trajectory import Example, Trajectories


@dataclass(frozen=True)
class Actor:
    """Lets policies act: the training dataloader, the worker ahead of training and evaluation have one each.

    Attributes:
        setting: how policies act, and what that is worth.
        policies: by name.
        rollout: shared with whoever turns its knobs, or a copy.
        student_view: likewise.
        precision: entered while a policy acts.
        held_out: whether it acts on held-out prompts, to be measured.
    """

    setting: Setting
    policies: Mapping[str, Policy]
    rollout: Rollout
    student_view: View | None = None
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    held_out: bool = False

    @blames_rows
    @torch.no_grad()
    def act(
        self, who: str, examples: list[Example], seeds: list[int], begun: Trajectories | None = None
    ) -> Trajectories:
        """Trajectories of one behavior policy; a teacher acts on what its view shows it.

        The observation is the student's in every case: that is what the loss conditions on.

        Args:
            who: acts.
            examples: rows of the data set.
            seeds: of the draws, one for each.
            begun: trajectories to go on from, of the same examples: what their masks hold is kept and not trained.
                Default: from recorded turns (``rollout.prefix_turns``), usually none.
        """
        student_examples = shown(self.student_view, examples)
        if who == "dataset":
            acted = self.setting.replay(self.policies["student"], examples, student_examples, self.rollout, seeds)
            acted = check_acted(self.setting, acted, examples, "replay")
        else:
            # the training dataloader acts outside of Lightning's hooks, but rollout and replay must agree in precision
            with self.precision(), phase(f"rollouts of {who}, {self.setting.unit}"):
                acted = replace(self._act(who, examples, student_examples, seeds, begun), examples=examples)
        seed = torch.tensor(seeds, device=acted.mask.device)
        return replace(acted, student_view=settings_of(self.student_view), sources=(who,), seed=seed)

    def branch(
        self, who: str, trajectories: Trajectories, rows: Tensor, steps: Tensor, horizon: int, seeds: list[int]
    ) -> Trajectories:
        """Continues visited states: trajectory ``rows[i]`` behind its first ``steps[i]`` steps, K of them.

        Args:
            who: acts.
            trajectories: whose states they are.
            rows, steps: ``[K]`` each; a state may come several times, with different seeds.
            horizon: steps that are added at most.
            seeds: of the draws, K.
        """
        begun = trajectories.to("cpu").select(rows).until(steps)
        longer = replace(self.rollout, horizon=int(begun.extent.max()) + horizon)
        acted = replace(self, rollout=longer).act(who, begun.examples, seeds, begun)
        beyond = acted.mask & (torch.arange(acted.mask.shape[1]) >= (begun.extent + horizon)[:, None])
        return replace(acted, mask=acted.mask & ~beyond, stopped=acted.stopped & ~beyond.any(1))

    def go_on(self, who: str, trajectories: Trajectories, horizon: int, seeds: list[int]) -> Trajectories:
        """Goes on behind trajectories, none of which has stopped; what they hold stays trained, as it was acted.

        Args:
            who: acts.
            trajectories: K of them.
            horizon: steps of a trajectory at most, those that it has among them.
            seeds: of the draws, K.
        """
        own = trajectories.to("cpu")
        longer = replace(self, rollout=replace(self.rollout, horizon=horizon))
        later = longer.act(who, own.examples, seeds, own.until(own.extent))
        width = min(own.mask.shape[1], later.mask.shape[1])
        held = torch.arange(width) < own.extent[:, None]
        for name in ("mask", "behavior_log_probs"):
            getattr(later, name)[:, :width][held] = getattr(own, name)[:, :width][held]
        return replace(later, seed=own.seed, weights_version=own.weights_version)

    def _act(
        self, who: str, examples: list[Example], seen: list[Example], seeds: list[int], begun: Trajectories | None
    ) -> Trajectories:
        setting, student = self.setting, self.policies["student"]
        sample = setting.sample_held_out if self.held_out else setting.sample
        prompts = check_prompts(setting, setting.collate(seen, student), seen)
        blend = self.rollout.blend if who == BLEND else None
        acting = {
            name: Acting(student, prompts, seen) if name == "student" else self._read_by(name, examples, seen)
            for name in (blend.policies if blend is not None else (who,))
        }
        first, *others = acting.values()
        with ExitStack() as stack:
            for one in acting.values():
                stack.enter_context(gathered(one.policy.model))
            if others:
                assert blend is not None
                acted = setting.sample_blended(acting, blend, self.rollout, seeds)
            else:
                if begun is None and self.rollout.prefix_turns:
                    begun = setting.prefixes(student, examples, seen, self.rollout)
                if begun is not None:
                    acted = setting.go_on(first, begun, self.rollout, seeds)
                else:
                    acted = sample(first.policy, first.prompts, first.examples, self.rollout, seeds)
        acted = check_acted(setting, acted, first.examples)
        if {*acting} == {"student"}:
            return acted
        return replace(acted, observation=acted.observation | prompts)  # the student's prompt over a teacher's

    def _read_by(self, name: str, examples: list[Example], seen: list[Example]) -> Acting:
        """Shows a teacher what it acts on: its view, or what the student reads where that shows nothing."""
        teacher, policy = self.setting.teachers[name], self.policies[name]
        views = teacher.seen(examples, seen)
        seeing = [example if view is None else view for example, view in zip(seen, views, strict=True)]
        reader = policy if teacher.own_template else self.policies["student"]
        return Acting(policy, self.setting.collate(seeing, reader), seeing)

    def checked_rewards(self, trajectories: Trajectories) -> tuple[Tensor | None, list[dict[str, Any]]]:
        """Checks what `rewards` returned: ``[B]`` on the CPU, NaN where one abstains (None: no rewards), and rows."""
        return check_scores(self.setting, self.setting.rewards(trajectories), trajectories)

    def judged(self, trajectories: Trajectories) -> Trajectories:
        """Adds notes and rewards, if there are any, unless they are there."""
        if trajectories.notes is not None:
            return trajectories
        notes, setting = self.setting.notes, self.setting
        trajectories = replace(trajectories, notes=[{} for _ in trajectories.examples])
        trajectories = self.with_rewards(write(notes, True, setting, trajectories))
        return without_long_views(setting, write(notes, False, setting, trajectories))

    @blames_rows
    def with_rewards(self, trajectories: Trajectories) -> Trajectories:
        """Adds rewards and their group statistics, if there are any."""
        if not self.setting.has_rewards:
            return trajectories
        reward, _ = self.checked_rewards(trajectories)
        assert reward is not None
        mean, std = group_statistics(reward, trajectories.group)
        return replace(trajectories, reward=reward, group_mean=mean, group_std=std)


class Judging:
    """Judges a generation batch, and again wherever others were put in the place of some.

    Notes may ask all ranks, so that all make them where one has to; and each time with the memory that they had before
    the batch, of which they would learn twice otherwise.

    Args:
        actor: who acted.
        ranks: of the run.
    """

    def __init__(self, actor: Actor, ranks: Ranks) -> None:
        self._actor, self._ranks = actor, ranks
        self._memories = deepcopy(memories(actor.setting.notes))

    def __call__(self, trajectories: Trajectories) -> Trajectories:
        """Adds notes and rewards where they are missing; every rank must ask."""
        notes = self._actor.setting.notes
        if notes and self._ranks.total(float(trajectories.notes is None)):
            remember(notes, deepcopy(self._memories))
            trajectories = trajectories.unjudged()
        return self._actor.judged(trajectories)


def group_statistics(reward: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Computes mean and population standard deviation of the rewards ``[B]`` within each group, ``[B]`` each.

    Rewards that are NaN (they abstain) count in neither; both are NaN where all of a group do.
    """
    _, member = group.unique(return_inverse=True)
    known = ~reward.isnan()
    count = torch.zeros(int(member.max()) + 1).index_add(0, member, known.float())
    # 0 / 0: NaN for groups that abstain altogether
    mean = torch.zeros_like(count).index_add(0, member, torch.where(known, reward, 0.0)) / count
    centered = torch.where(known, reward - mean[member], 0.0)
    variance = torch.zeros_like(count).index_add(0, member, centered.square()) / count
    return mean[member], variance.sqrt()[member]
