"""Callbacks that let policies act besides the rollouts, and put what they did in the place of some.

Shape legend: B trajectories.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..callback import DistillationCallback
from ..module import OnPolicyDistillation
from ..rollout_settings import derived_seed
from ..trajectory import Trajectories

INSERTED, REWRITTEN, JUDGED = 7001, 7002, 7003
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
