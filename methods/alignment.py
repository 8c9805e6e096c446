"""Alignment: whether a teacher pulls the student towards success, state by state (2605.10889).

Shape legend: B trajectories, T steps, S states, K candidate actions of a state.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..callback import DistillationCallback
from ..distribution import CategoricalChunk
from ..module import OnPolicyDistillation
from ..objective import OpenSteps
from ..rollout_settings import derived_seed
from ..sharding import refuse_sharded
from ..teacher import Elsewhere
from ..trajectory import Trajectories

STATE, VISIT = 7101, 7102
"""Which further draw of a trajectory's seed says which of its states is looked at, and continues behind it."""


class Alignment(DistillationCallback):
    """Logs whether a teacher pulls the student towards success, as what follows each action tells (2605.10889).

    At one state of some rollouts the student goes on ``visits`` times behind each of its likely actions k; P_k is the
    mean reward. With p and q of student and teacher among these, the gradient that would raise success and the one of
    KL(student‖teacher) are g*_k = p_k·(P_k − Σ p·P) and g_k = −p_k·(ℓ_k − Σ p·ℓ), ℓ = log p − log q. Logged:

        train/<teacher>/align: the mean of cos(g*, g) over states where success depends on the action; of states of
            rollouts that were right and wrong also ``align_right`` and ``align_wrong``.
        train/<teacher>/align_states: the share of such states.
        train/<teacher>/align_advantage: Σ q·P − Σ p·P over all states.

    It costs ``states`` × K × ``visits`` rollouts; the paper makes some 100,000 for a question. What is trained stays as
    it is.

    Args:
        teacher: an entry of ``model.teachers``. Default ``teacher``.
        every: generation batches between looks, from the first on. Default 50 (ours).
        states: of each rank, at most one of a rollout. Default 8 (ours).
        visits: continuations of each action. Default 16 (ours; 2605.10889 has 100, and keeps those with 20).
        floor: least probability of an action that is looked at. Default 0.02 (2605.10889).
        most: actions of a state, the likeliest. Default 8 (ours).

    Raises:
        ValueError: a number out of range; when training begins: no rewards, a setting that can't go on from a state, a
            teacher that has no model here, or a student that is sharded.
    """

    remembers = ("seen",)

    def __init__(
        self,
        teacher: str = "teacher",
        every: int = 50,
        states: int = 8,
        visits: int = 16,
        floor: float = 0.02,
        most: int = 8,
    ) -> None:
        if min(every, states, visits) < 1 or most < 2 or not 0 <= floor < 1:
            raise ValueError(
                f"Alignment: every={every}, states={states} and visits={visits} must be >= 1, most={most} >= 2 and "
                f"floor={floor} in [0, 1)"
            )
        self.teacher, self.every, self.states, self.visits = teacher, every, states, visits
        self.floor, self.most, self.seen = floor, most, 0
        self.asks = self.distributions = frozenset({teacher})

    def check(self, module: OnPolicyDistillation) -> None:
        if not module.has_rewards:
            raise ValueError("Alignment compares with what is rewarded, and nothing is: set model.reward")
        if "turn" not in module.provides:
            raise ValueError("Alignment goes on from states, which this setting cannot")
        if isinstance(module.teachers[self.teacher].weights, Elsewhere):
            raise ValueError(f"Alignment.teacher: model.teachers.{self.teacher} has no model in this process")
        refuse_sharded(module.trainer, "Alignment", "from whose states ranks go on unequally often")

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        if self.seen % self.every == 0:
            self._look(module, trajectories.to("cpu"))
        self.seen += 1
        return trajectories

    def _look(self, module: OnPolicyDistillation, trajectories: Trajectories) -> None:
        # 1. a state of each, with the student's likely actions there
        assert trajectories.reward is not None
        known = ~trajectories.reward.isnan() & trajectories.mask.any(1)
        some = trajectories.select(known.nonzero().flatten()[: self.states])
        if not len(some):
            return
        which = torch.tensor([derived_seed(seed, STATE) for seed in some.seed.tolist()]) % some.length
        step = (~some.mask).int().argsort(dim=1, stable=True).gather(1, which[:, None])[:, 0]
        action, p, q = self._candidates(module, some, step)
        # 2. how often each of them ends well
        success = self._success(module, some, step, action, p > 0)
        # 3. what that says of the teacher
        cosine, decided = alignment(p, q, success)
        assert some.reward is not None
        right, name = some.reward >= 0.5, self.teacher
        module.record(f"{name}/align", cosine[decided])
        module.record(f"{name}/align_right", cosine[decided & right])
        module.record(f"{name}/align_wrong", cosine[decided & ~right])
        module.record(f"{name}/align_states", decided.double())
        module.record(f"{name}/align_advantage", advantage(p, q, success))

    def _candidates(
        self, module: OnPolicyDistillation, some: Trajectories, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reads the likeliest actions ``[S, K]`` at a step of each, and what student and teacher give them; 0: none."""
        only = replace(some, mask=torch.arange(some.mask.shape[1]) == step[:, None])
        read: list[tuple[Tensor, ...]] = []

        def likeliest(steps: OpenSteps) -> Tensor:
            student, teacher = steps.student, steps.teacher
            assert isinstance(student, CategoricalChunk)
            assert isinstance(teacher, CategoricalChunk)
            log_p, action = student.log_probs().topk(min(self.most, student.logits.shape[-1]))
            read.append((action.cpu(), log_p.exp().cpu(), teacher.log_probs().gather(-1, action).exp().cpu()))
            return log_p[:, 0]

        blind = module.per_step(only, likeliest, self.teacher).isnan().all(1)
        action, p, q = (torch.cat(parts) for parts in zip(*read, strict=True))
        p = p.where((p > self.floor) & ~blind[:, None], 0.0)
        return action, p, q.where(p > 0, 0.0)

    def _success(
        self, module: OnPolicyDistillation, some: Trajectories, step: Tensor, action: Tensor, wanted: Tensor
    ) -> Tensor:
        """Computes the mean reward ``[S, K]`` of what the student does behind each wanted action."""
        # 1. rollouts up to the action, as often as it is visited
        state, place = wanted.nonzero().repeat_interleave(self.visits, 0).T
        begun = some.select(state).until(step[state] + 1)
        begun.actions[torch.arange(len(state)), step[state]] = action[state, place].to(begun.actions)
        draws = torch.arange(len(state)) % self.visits
        seeds = [derived_seed(seed, VISIT + i) for seed, i in zip(begun.seed.tolist(), draws.tolist(), strict=True)]
        # 2. what comes then: nothing, where the action ends the rollout or the horizon is reached
        ends = torch.isin(action[state, place], torch.tensor(getattr(module, "eos", [])))
        reward = torch.zeros(len(state))
        goes_on = (~ends & (begun.extent < module.rollout.horizon)).nonzero().flatten()
        stays = torch.ones(len(state), dtype=torch.bool)
        if len(goes_on):
            some_begun = begun.select(goes_on)
            acted = module.actor.act("student", some_begun.examples, [seeds[i] for i in goes_on.tolist()], some_begun)
            completed = replace(acted, mask=torch.arange(acted.mask.shape[1]) < acted.extent[:, None])
            reward[goes_on], stays[goes_on] = self._reward(module, completed), False
        if stays.any():
            reward[stays] = self._reward(module, begun.select(stays.nonzero().flatten()))
        total = torch.zeros(wanted.shape).index_put((state, place), reward, accumulate=True)
        return total / self.visits

    @staticmethod
    def _reward(module: OnPolicyDistillation, trajectories: Trajectories) -> Tensor:
        reward, _ = module.actor.checked_rewards(trajectories)
        assert reward is not None
        return reward.nan_to_num().float()


def alignment(p: Tensor, q: Tensor, success: Tensor) -> tuple[Tensor, Tensor]:
    """Computes cos(g*, g) ``[S]``, and where it is defined, of ``[S, K]`` each; where p is 0 there is no action."""
    p = p / p.sum(-1, keepdim=True).clamp(min=1e-12)
    here = p > 0
    gap = (p.clamp(min=1e-12).log() - q.clamp(min=1e-12).log()).where(here, 0.0)
    ideal = p * (success - (p * success).sum(-1, keepdim=True))
    pull = -p * (gap - (p * gap).sum(-1, keepdim=True))
    return F.cosine_similarity(ideal, pull, dim=-1, eps=1e-12), (ideal.norm(dim=-1) > 1e-6) & (pull.norm(dim=-1) > 1e-6)


def advantage(p: Tensor, q: Tensor, success: Tensor) -> Tensor:
    """Computes how much more often the teacher would succeed ``[S]``, both renormalized to the candidates."""
    of_both = ((side / side.sum(-1, keepdim=True).clamp(min=1e-12) * success).sum(-1) for side in (q, p))
    teacher, student = of_both
    return teacher - student
