"""Callbacks of single papers: what is done to a generation batch before it is trained, and what follows its updates.

Shape legend: B trajectories of T steps.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import median

import lightning as L
import torch
from torch import Tensor

from ..actor import group_statistics
from ..callback import DistillationCallback
from ..callbacks import KnobCallback
from ..module import OnPolicyDistillation
from ..objective import OpenSteps, ReverseKL
from ..trajectory import Trajectories


def refuse_without_rewards(callback: DistillationCallback, module: OnPolicyDistillation) -> None:
    """Refuses a run without rewards.

    Raises:
        ValueError: naming the callback.
    """
    if not module.has_rewards:
        raise ValueError(f"{type(callback).__name__} reads rewards: set model.reward")


def spread(trajectories: Trajectories) -> Tensor:
    """Returns the largest minus the smallest reward of each trajectory's group ``[B]``; 0 where all abstain."""
    assert trajectories.reward is not None
    _, member = trajectories.group.unique(return_inverse=True)
    known, shape = ~trajectories.reward.isnan(), (int(member.max()) + 1,)
    low, high = torch.full(shape, torch.inf), torch.full(shape, -torch.inf)
    low.scatter_reduce_(0, member[known], trajectories.reward[known], "amin")
    high.scatter_reduce_(0, member[known], trajectories.reward[known], "amax")
    return (high - low).clamp(min=0)[member]


class DynamicSampling(DistillationCallback):
    """Leaves out groups whose rewards are all equal: they have no advantage (DAPO, 2503.14476).

    DAPO rolls out until the batch is full again; here it is trained with what is left, and ``normalizer: on`` or
    ``steps`` divides by that. Logged: ``train/dynamic_sampling/dropped``, the share of trajectories that is left out;
    those count in ``train/length`` with no steps. Put it before callbacks that change rewards.

    Raises:
        ValueError: when training begins: no rewards, or groups of one.
    """

    def check(self, module: OnPolicyDistillation) -> None:
        refuse_without_rewards(self, module)
        if module.rollout.group_size < 2:
            raise ValueError("DynamicSampling compares the rewards of a group: set rollout.group_size > 1")

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        differ = spread(trajectories) > 0
        module.record("dynamic_sampling/dropped", (~differ).double())
        return replace(trajectories, mask=trajectories.mask & differ[:, None])


class OverlongPunishment(DistillationCallback):
    """Lowers the reward of rollouts that come near to the horizon: by up to 1, linearly (DAPO, 2503.14476).

    A rollout of more than L − cache of at most L steps loses (its length − (L − cache)) / cache, and the statistics of
    its group are computed anew. Logged: ``train/overlong_punishment``, the mean that is taken off.

    Args:
        cache: the end of the horizon in which rollouts are punished, as a share of it. Default 0.2 (DAPO: 4,096 of
            20,480).

    Raises:
        ValueError: a share that is not in (0, 1]; when training begins: no rewards.
    """

    def __init__(self, cache: float = 0.2) -> None:
        if not 0 < cache <= 1:
            raise ValueError(f"OverlongPunishment.cache must be in (0, 1], got {cache}")
        self.cache = cache

    def check(self, module: OnPolicyDistillation) -> None:
        refuse_without_rewards(self, module)

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        assert trajectories.reward is not None
        cache = self.cache * module.rollout.horizon
        beyond = (trajectories.length - (module.rollout.horizon - cache)) / cache
        punishment = beyond.clamp(0, 1).to(trajectories.reward)
        module.record("overlong_punishment", punishment.double())
        reward = trajectories.reward - punishment
        mean, std = group_statistics(reward, trajectories.group)
        return replace(trajectories, reward=reward, group_mean=mean, group_std=std)


class EntropyGate(KnobCallback):
    """Turns a knob to 0 while the teacher's entropy is low, and back when it has recovered (AntiSD, 2605.11609).

    The entropy is the median over a generation batch's trained steps, on all ranks. It is watched with the knob at 0
    for ``warmup`` batches, whose median is the level. From then on the gate closes below ``close`` times the level, and
    opens again at the level. Logged: ``train/entropy_gate/entropy``, and the knob.

    Args:
        knob: its path, such as ``objective.terms.anti.signal.advantage.share``.
        value: of the knob while the gate is open. Default 0.5 (AntiSD).
        warmup: generation batches before it opens first. Default 5 (AntiSD, whose batches are optimizer steps).
        close: share of the level below which it closes. Default 0.93 (AntiSD).
        teacher: an entry of ``model.teachers``.

    Raises:
        ValueError: a number out of range; when training begins, no such knob or teacher.
    """

    remembers = ("entropies", "is_open")

    def __init__(
        self, knob: str, value: float = 0.5, warmup: int = 5, close: float = 0.93, teacher: str = "teacher"
    ) -> None:
        if warmup < 1 or not 0 < close <= 1:
            raise ValueError(f"EntropyGate: warmup={warmup} must be >= 1 and close={close} in (0, 1]")
        self.knob, self.value, self.warmup, self.close, self.teacher = knob, value, warmup, close, teacher
        self.entropies: list[float] = []
        self.is_open = True

    @property
    def knobs(self) -> tuple[str, ...]:
        return (self.knob,)

    @property
    def asks(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self.teacher})

    @property
    def distributions(self) -> frozenset[str]:  # type: ignore[override]
        return self.asks

    def advance(self, module: OnPolicyDistillation) -> None:
        is_warm = len(self.entropies) == self.warmup
        self.turn(self.knob, self.value if is_warm and self.is_open else 0.0)

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        entropy = module.per_step(trajectories, lambda steps: steps.teacher.entropy(), self.teacher)
        everywhere = module.gather(entropy[~entropy.isnan()].to(module.device))
        if len(everywhere):
            module.record("entropy_gate/entropy", float(everywhere.median()))
            self.see(float(everywhere.median()))
        self.advance(module)
        return trajectories

    def see(self, entropy: float) -> None:
        """Opens or closes by the entropy of one more generation batch."""
        if len(self.entropies) < self.warmup:
            self.entropies.append(entropy)
            return
        level = median(self.entropies)
        # between the two it stays as it is
        self.is_open = entropy >= (self.close * level if self.is_open else level)


def cliff(teacher: float, base: float, cap: float) -> float:
    """Computes the strength λ* of extrapolation from which on a token of the output's form is lost (2605.08737).

    λ* = [log((1−p)/(c−1+p)) − log((1−b)/b)] / [log((1−p)/p) − log((1−b)/b)]: at base·(teacher/base)^λ the other tokens
    have 1/c of what the teacher gives them, where a ratio that is capped at c no longer pulls them back.

    Args:
        teacher: p, its probability of the token.
        base: b, the base's.
        cap: c, of the ratio.

    Returns:
        Infinity where the base is as sure of the token as the teacher.
    """
    p, b = (min(max(probability, 1e-6), 1 - 1e-6) for probability in (teacher, base))
    if b >= p:
        return math.inf
    of_base = math.log((1 - b) / b)
    return (math.log((1 - p) / (cap - 1 + p)) - of_base) / (math.log((1 - p) / p) - of_base)


class BelowCliff(KnobCallback):
    """Holds the strength of an extrapolation below the cliff behind which the output loses its form (2605.08737).

    p and b are the mean probabilities that teacher and base give to the ids of the form where the student writes them,
    on all ranks; the strength is at most `cliff` of them minus a margin, and never below 1. Where no such id was
    written, the last limit holds. Logged: ``train/below_cliff/threshold``, and the knob.

    Args:
        knob: its path, such as ``objective.terms.cliff.signal.advantage.strength``.
        ids: of tokens that the form asks for, such as a bracket or a mark before the answer.
        strength: where the cliff is further away. Default 1.2 (ours; the paper's collapses set in at 1.15 to 1.25).
        cap: c of the term's `TeacherRatio`. Default 5 (2605.08737).
        margin: default 0.05 (ours: the paper advises one step of its grid).
        every: generation batches between two looks, each of which asks both. Default 10 (ours).
        teacher, base: entries of ``model.teachers``.

    Raises:
        ValueError: a number out of range, or no ids; when training begins: no such knob or teacher, or no ids at all.
    """

    remembers = ("limit", "seen")

    def __init__(
        self,
        knob: str,
        ids: list[int],
        strength: float = 1.2,
        cap: float = 5.0,
        margin: float = 0.05,
        every: int = 10,
        teacher: str = "teacher",
        base: str = "base",
    ) -> None:
        if not ids or every < 1 or strength < 1 or cap <= 1 or margin < 0:
            raise ValueError(
                "BelowCliff: ids must not be empty, strength and every >= 1, cap > 1 and margin >= 0; "
                f"got {ids}, {strength}, {every}, {cap} and {margin}"
            )
        self.knob, self.ids, self.strength, self.cap, self.margin = knob, ids, strength, cap, margin
        self.every, self.teacher, self.base = every, teacher, base
        self.limit, self.seen = math.inf, 0

    @property
    def knobs(self) -> tuple[str, ...]:
        return (self.knob,)

    @property
    def asks(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self.teacher, self.base})

    def check(self, module: OnPolicyDistillation) -> None:
        super().check(module)
        if "categorical" not in module.provides:
            raise ValueError("BelowCliff reads ids of a vocabulary, which this setting has none of")

    def advance(self, module: OnPolicyDistillation) -> None:
        self.turn(self.knob, min(self.strength, self.limit))

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        if self.seen % self.every == 0:
            of_form = trajectories.mask & torch.isin(trajectories.actions, torch.tensor(self.ids))
            teacher, base = (
                self._probability(module, trajectories, of_form, name) for name in (self.teacher, self.base)
            )
            if teacher is not None and base is not None:
                self.see(teacher, base)
                if math.isfinite(threshold := self.limit + self.margin):
                    module.record("below_cliff/threshold", threshold)
        self.seen += 1
        self.advance(module)
        return trajectories

    @staticmethod
    def _probability(
        module: OnPolicyDistillation, trajectories: Trajectories, where: Tensor, teacher: str
    ) -> float | None:
        """Mean probability of the steps ``where``, on all ranks; None: there is none."""

        def read(steps: OpenSteps) -> Tensor:
            return steps.teacher.log_prob(steps.action).exp()

        values = module.per_step(trajectories, read, teacher)
        everywhere = module.gather(values[where & ~values.isnan()].to(module.device))
        return float(everywhere.double().mean()) if len(everywhere) else None

    def see(self, teacher: float, base: float) -> None:
        """Sets the limit by the mean probabilities of one more generation batch."""
        self.limit = max(1.0, cliff(teacher, base, self.cap) - self.margin)


class RockTokens(DistillationCallback):
    """Writes which ids have the largest part of the loss: mean loss × frequency (Rock tokens, 2605.09253).

    The loss is KL(student‖teacher) at each trained step, summed by the step's action over the whole run, or its last
    part if it was resumed. ``rock_tokens.json`` in the run's folder has the ids, the largest first, with that share of
    the loss and their frequency, for the weight `TokenIds`. The paper multiplies by the share of an id's losses that
    recurs in similar contexts; what is similar was not found, so that is left out.

    Args:
        count: how many ids. Default 100 (2605.09253).
        every: generation batches between two looks, each of which asks student and teacher. Default 10 (ours).
        teacher: an entry of ``model.teachers``.

    Raises:
        ValueError: a number below 1; when training begins: steps that are no ids.
    """

    remembers = ("losses", "counts", "seen")

    def __init__(self, count: int = 100, every: int = 10, teacher: str = "teacher") -> None:
        if min(count, every) < 1:
            raise ValueError(f"RockTokens: count={count} and every={every} must be >= 1")
        self.count, self.every, self.teacher = count, every, teacher
        self.losses: dict[int, float] = {}
        self.counts: dict[int, int] = {}
        self.seen = 0

    @property
    def asks(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self.teacher})

    @property
    def distributions(self) -> frozenset[str]:  # type: ignore[override]
        return self.asks

    def check(self, module: OnPolicyDistillation) -> None:
        if "categorical" not in module.provides:
            raise ValueError("RockTokens counts ids of a vocabulary, which this setting has none of")

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        if self.seen % self.every == 0:
            losses = module.per_step(trajectories, ReverseKL(), self.teacher)
            known = ~losses.isnan()
            pairs = torch.stack([trajectories.actions[known].double(), losses[known].double()], 1)
            everywhere = module.gather(pairs.to(module.device)).cpu()
            for action in everywhere[:, 0].unique().tolist():
                of_action = everywhere[everywhere[:, 0] == action, 1]
                self.losses[int(action)] = self.losses.get(int(action), 0.0) + float(of_action.sum())
                self.counts[int(action)] = self.counts.get(int(action), 0) + len(of_action)
        self.seen += 1
        return trajectories

    def ranked(self) -> list[dict[str, float]]:
        """Lists the ids with the largest part of the loss, the largest first."""
        loss, count = sum(self.losses.values()) or 1.0, sum(self.counts.values())
        ids = sorted(self.losses, key=lambda i: self.losses[i], reverse=True)[: self.count]
        return [{"id": i, "loss": self.losses[i] / loss, "frequency": self.counts[i] / count} for i in ids]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "rock_tokens.json"
            path.write_text(json.dumps(self.ranked(), indent=1), encoding="utf-8")
