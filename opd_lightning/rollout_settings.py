"""Rollout: settings of the behavior policy, and the seeds of its draws."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .blend import BLEND, Blend
from .finite import Finite

COUNTS = ("batch_size", "group_size", "micro_batch_size", "epochs", "max_prompt_length", "turns", "observation_length")


@dataclass
class Rollout:
    """How the behavior policy acts. The fields are public knobs: callbacks may turn them between generations.

    Temperature and filters shape what is sampled and nothing else: stored log-probs, importance ratios and signals are
    those of the plain distribution at temperature 1 (a divergence may have a temperature of its own).

    Args:
        batch_size: prompts per generation batch, on each rank.
        group_size: trajectories per prompt.
        micro_batch_size: trajectories per forward and backward pass. Default: one generation batch is one optimizer
            step. Smaller: a generation batch serves several micro-batches, and several optimizer steps if it is
            larger than micro_batch_size × trainer.accumulate_grad_batches.
        epochs: how often each generation batch is trained. Default 1. From the second time on its optimizer steps come
            in an order drawn from the run's seed (each keeps its trajectories, so the order depends neither on
            micro_batch_size nor on the number of ranks), and the student is no longer the one that acted: behavior
            log-probs and ``weights_version`` stay those of sampling. What a teacher whose weights stand still
            (`Frozen`, `Initial`) said is kept in the machine's memory for the next time, as hidden states: the steps of
            a generation batch (padding included) × hidden size × bytes of the teacher's dtype, on each rank, as long as
            its view shows the same; teachers that move are asked again, and so are all under fsdp2 and after a resume.
        horizon: steps after which a rollout ends if it has not stopped by itself (for text: max new tokens).
        temperature: 0 is greedy. Default 1.
        top_p, top_k, min_p: filters, off by default.
        behavior: who acts, with shares that sum to 1, drawn per prompt: ``student``, ``dataset`` (the column
            ``completion``), the name of a teacher, who sees its own view, or ``blend``, several of them as one. GKD's λ
            is ``{student: λ, dataset: 1 − λ}``; SFT is ``{dataset: 1}``.
        members: in place of shares, how many trajectories of every group each policy makes, such as
            ``{student: 4, dataset: 1}`` (StableOPD, 2604.08527); group_size is then their sum.
        blend: how the behavior policy ``blend`` mixes its policies at every step; in settings that say so.
        turns: turns of an episode at most, where there is an environment; then 8 by default. What was observed counts
            in ``horizon``, as what was written does.
        turn_timeout: seconds that the environment may take for one turn. Default 10.
        observation_length: characters of a text that it answers; what is longer is cut, with a remark. Default 2,000.
        prefix_turns: recorded turns (of the column ``completion``) that rollouts go on from, with what was observed
            behind them; they are read and not trained, and their steps count in ``horizon``. A row with fewer turns
            leaves its last one to the policy, one without a recording begins at its prompt. Default 0. Evaluation
            begins at prompts.
        max_prompt_length: student prompts beyond it are refused or skipped when the data is set up (never cut).
        max_staleness: how many generation batches are rolled out ahead, by a thread with a copy of the student, while
            it is trained. A generation batch that is trained after optimizer step n was sampled with the weights
            before the max_staleness generation batches that came before it: that is fixed, not a matter of timing, so
            runs are reproducible and resume exactly. 0, the default, is on-policy. From 1 on rollouts and training
            overlap; larger values only add lag.

    Raises:
        ValueError: a value out of range, named.
    """

    batch_size: int = 32
    group_size: int = 1
    micro_batch_size: int | None = None
    epochs: int = 1
    horizon: int = 128
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    behavior: dict[str, float] = field(default_factory=lambda: {"student": 1.0})
    members: dict[str, int] | None = None
    blend: Blend | None = None
    turns: int | None = None
    turn_timeout: float = 10.0
    observation_length: int = 2000
    prefix_turns: int = 0
    max_prompt_length: int | None = None
    max_staleness: int = 0

    __setattr__ = Finite.__setattr__

    def __post_init__(self) -> None:
        for name in ("max_staleness", "prefix_turns"):
            if getattr(self, name) < 0:
                raise ValueError(f"rollout.{name} must be >= 0, got {getattr(self, name)}")
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"rollout.{name} must be >= 1, got {value}")
        if not self.turn_timeout > 0:
            raise ValueError(f"rollout.turn_timeout must be > 0, got {self.turn_timeout}")
        check_sampling("rollout", self)
        shares = self.behavior.values()
        if not self.behavior or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"rollout.behavior: shares must be >= 0 and sum to 1, got {self.behavior}")
        if self.members is not None:
            self._check_members(self.members)
        if BLEND in (self.members or self.behavior) and self.blend is None:
            raise ValueError(f"rollout.behavior={self.members or self.behavior}: rollout.blend says nothing of whom")
        if self.blend is not None and BLEND not in (self.members or self.behavior):
            raise ValueError("rollout.blend: nobody acts by it; give 'blend' a share in rollout.behavior (it may be 0)")

    def _check_members(self, members: dict[str, int]) -> None:
        if self.behavior != {"student": 1.0}:
            raise ValueError(f"rollout.members={members} and rollout.behavior={self.behavior} both say who acts")
        if not members or min(members.values()) < 1:
            raise ValueError(f"rollout.members: every policy must make at least one of a group, got {members}")
        size = sum(members.values())
        if self.group_size not in (1, size):
            raise ValueError(f"rollout.group_size={self.group_size}, but rollout.members are {size}; leave it out")
        self.group_size = size

    @property
    def sources(self) -> set[str]:
        """Behavior policies that act at all."""
        return {name for name, share in (self.members or self.behavior).items() if share > 0}

    def check(self, teachers: Set[str], provides: Set[str]) -> None:
        """Checks who acts.

        Args:
            teachers: names in model.teachers.
            provides: what the setting offers (`Setting.provides`).

        Raises:
            ValueError: nobody is called so, or the setting can't blend policies.
        """
        for name in sorted(self.policies - {"student", "dataset"} - teachers):
            key = "behavior" if name in self.sources else "blend"
            raise ValueError(f"rollout.{key} names '{name}', which is no entry of model.teachers: {sorted(teachers)}")
        if self.blend is not None and BLEND not in provides:
            raise ValueError("rollout.blend: this setting has no loop in which several policies could act as one")
        if self.prefix_turns and "turn" not in provides:
            raise ValueError(f"rollout.prefix_turns={self.prefix_turns}: this setting records no turns to go on from")
        if self.turns is not None and "turn" not in provides:
            raise ValueError(f"rollout.turns={self.turns}: in this setting a rollout is one turn")
        if self.prefix_turns and self.blend is not None:
            raise ValueError(f"rollout.prefix_turns={self.prefix_turns}: a blend can't go on from recorded turns")

    @property
    def policies(self) -> set[str]:
        """Student and teachers that act at all, also in a blend; and the data set."""
        blended = {"student", *self.blend.shares} if self.blend is not None and BLEND in self.sources else set()
        return self.sources - {BLEND} | blended

    def micro_batches(self, accumulate: int) -> tuple[int, int]:
        """Trajectories per micro-batch, and micro-batches per generation batch, for this accumulation.

        Raises:
            ValueError: the generation batch cannot be cut into whole optimizer steps.
        """
        total = self.batch_size * self.group_size
        size = self.micro_batch_size or total // accumulate
        if size < 1 or total % (size * accumulate):
            raise ValueError(
                f"a generation batch of {total} trajectories (rollout.batch_size={self.batch_size} × "
                f"group_size={self.group_size}) cannot be cut into optimizer steps of {size or 1} × {accumulate} "
                f"(rollout.micro_batch_size × trainer.accumulate_grad_batches); make it a multiple"
            )
        return size, total // size


def check_sampling(key: str, settings: Any) -> None:
    """Checks the settings that rollouts and evaluation share.

    Raises:
        ValueError: a value out of range, named below ``key``.
    """
    for name in ("horizon", "top_k"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{key}.{name} must be >= 1, got {value}")
    if settings.temperature < 0:
        raise ValueError(f"{key}.temperature must be >= 0 (0 is greedy), got {settings.temperature}")
    for name in ("top_p", "min_p"):
        value = getattr(settings, name)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{key}.{name} must be in (0, 1], got {value}")


def derived_seed(*key: int) -> int:
    """Derives a 63-bit seed from whole numbers such as (run seed, prompt draw, member of the group)."""
    # 63 bits, since trajectories keep their seeds as int64
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def check_limit(trainer: Any) -> None:
    """Refuses limits that end an epoch within an optimizer step.

    Raises:
        ValueError: an epoch would end in the middle of an optimizer step, which Lightning would then take with a part
            of its micro-batches.
    """
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    if batches % accumulate and not trainer.fast_dev_run:
        raise ValueError(
            f"trainer.limit_train_batches={trainer.limit_train_batches} ends an epoch after {batches} micro-batches, "
            f"in the middle of an optimizer step of trainer.accumulate_grad_batches={accumulate}; make it a multiple"
        )


def chosen(draws: Tensor, shares: Tensor, seed: int) -> Tensor:
    """Draws the index ``[B]`` of the behavior policy, once per prompt, so that a group is never mixed.

    Args:
        draws: ``[B]``, the number of each prompt's draw.
        shares: of the policies.
        seed: of the run.
    """
    if len(shares) == 1:
        return torch.zeros_like(draws)
    uniform = torch.tensor([np.random.default_rng((seed, 1, int(draw))).random() for draw in draws])
    # clamp: shares may sum to a little less than 1 (`Rollout` allows 1e-6)
    return torch.searchsorted(shares.double().cumsum(0), uniform, right=True).clamp(max=len(shares) - 1)
