"""WeightExtrapolation: longer strides where the weights keep their direction (EffOPD)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ..callback import DistillationCallback
from ..module import OnPolicyDistillation
from ..optimizer_step import OptimizerStep
from ..rollout import RolloutLoader
from ..rollout_settings import derived_seed
from ..rows import row_of
from ..sharding import refuse_sharded
from ..trajectory import Example

Weights = dict[str, Tensor]
DRAWS = 2**34  # keeps its choice of examples apart from other draws


class WeightExtrapolation(DistillationCallback):
    """EffOPD (2605.11739): after 1, 2, 4, 8, … optimizer steps, weights further along the way are tried out.

    The way is Δ, from the weights with which training went on at the last power of two (at first: from the beginning)
    to those of now. Candidates are the weights of now + d·Δ, for the distances d in turn. Each is evaluated on a few
    training examples, as `Evaluation` has it, and accepted if its mean reward is at least that of the last one
    accepted; the first that fails ends it. Where none is accepted, the weights stay as they were, bit for bit. The
    optimizer's moments are left alone.

    Costs a second and third copy of the trained weights, of which the checkpoint holds one, and at every power of two
    up to one rollout more than there are distances. Adapters are extrapolated factor by factor, so what they do does
    not lie on a line. Logged: ``train/extrapolation/distance``, 0 where nothing was accepted, and
    ``train/extrapolation/reward``, of the weights that were kept.

    Example::

        callbacks+:
          - class_path: WeightExtrapolation
            init_args: {examples: 100}

    Args:
        distances: default 2, 4, 6, 8, 10 (2k for k = 1 … 5, as the paper prints it; a re-implementation took 2^k).
        examples: how many, over all ranks. Default 50 (the paper's).

    Raises:
        ValueError: distances that do not rise from above 0, examples < 1; when training begins: no reward, or a
            strategy that shards the student.
    """

    remembers = ("before",)

    def __init__(self, distances: Sequence[float] = (2.0, 4.0, 6.0, 8.0, 10.0), examples: int = 50) -> None:
        if not distances or distances[0] <= 0 or list(distances) != sorted(set(distances)):
            raise ValueError(f"WeightExtrapolation.distances must be positive and rise, got {list(distances)}")
        if examples < 1:
            raise ValueError(f"WeightExtrapolation.examples must be >= 1, got {examples}")
        self.distances, self.examples = tuple(distances), examples
        self.before: Weights | None = None

    def check(self, module: OnPolicyDistillation) -> None:
        if not module.has_rewards:
            raise ValueError("WeightExtrapolation chooses by reward: set model.reward")
        refuse_sharded(module.trainer, "WeightExtrapolation", "whose weights it could not put back")

    def on_optimizer_step_start(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        if module.global_step == 0:
            self.before = _copy(module)

    def on_optimizer_step_end(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        if module.global_step & (module.global_step - 1):
            return  # no power of two
        if self.before is not None:
            self._go_on(module, self.before)
        self.before = _copy(module)

    @torch.no_grad()
    def _go_on(self, module: OnPolicyDistillation, before: Weights) -> None:
        now, examples = _copy(module), self._draw(module.trainer)

        def place(distance: float) -> None:
            for name, weight in _trained(module).items():
                # at distance 0 the weights themselves, bit for bit
                weight.copy_(now[name] + distance * (now[name] - before[name]) if distance else now[name])

        accepted, best = 0.0, self._reward(module, examples)
        for distance in self.distances:
            place(distance)
            reward = self._reward(module, examples)
            if not reward >= best:  # also NaN, where all abstain
                break
            accepted, best = distance, reward
        place(accepted)
        module.record("extrapolation/distance", accepted)
        module.record("extrapolation/reward", best)
        rank_zero_info(f"WeightExtrapolation: step {module.global_step}: went {accepted} further, reward {best:.3f}")

    def _draw(self, trainer: L.Trainer) -> list[Example]:
        """This rank's share of the examples."""
        loader = trainer.train_dataloader
        assert isinstance(loader, RolloutLoader)
        draws = torch.Generator().manual_seed(derived_seed(loader.seed, DRAWS, trainer.global_step))
        chosen = torch.randperm(len(loader.dataset), generator=draws)[: self.examples].tolist()
        return [row_of(loader.dataset, row) for row in chosen[trainer.global_rank :: trainer.world_size]]

    @staticmethod
    def _reward(module: OnPolicyDistillation, examples: list[Example]) -> float:
        """Measures the mean reward of the student as it is now, over all ranks; NaN where all abstain."""
        size, _ = module.rollout.micro_batches(module.trainer.accumulate_grad_batches)
        total, count = 0.0, 0
        for place, start in enumerate(range(0, len(examples), size)):
            rolled = module.evaluator.act("student", examples[start : start + size], place)
            reward, _ = module.actor.checked_rewards(rolled)
            assert reward is not None
            total, count = total + float(reward.nansum()), count + int((~reward.isnan()).sum())
        everyone = module.total(float(count))
        return module.total(total) / everyone if everyone else math.nan


def _trained(module: OnPolicyDistillation) -> Weights:
    return {name: weight for name, weight in module.student.named_parameters() if weight.requires_grad}


def _copy(module: OnPolicyDistillation) -> Weights:
    return {name: weight.detach().clone() for name, weight in _trained(module).items()}
