"""LearnedScore: a model of the student's own samples, trained beside the student (the fake score of DMD2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from ...optimization import in_place
from ...optimizer_step import OptimizerStep
from ...policy import Policy
from ...pretrained import Pretrained
from ...ranks import Ranks
from ...resume import apply_settings, check_settings, settings_of
from ...rollout_settings import derived_seed
from ...teacher import TeacherWeights
from ...trajectory import Example, Trajectories
from . import flow
from .query import RestrictedField, VelocityField
from .velocity_target import drawn


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """Builds AdamW: learning rate 1e-4, betas (0, 0.999) (AnyFlow's), no weight decay."""
    return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.0, 0.999), weight_decay=0.0)


class Samples(Protocol):
    """Interface of the setting whose samples a learned score learns."""

    padding: ClassVar[dict[str, tuple[float, str]]]
    policies: dict[str, Policy]

    def shown(self, examples: list[Example], settings: dict[str, Any] | None = None) -> list[Example]:
        """Applies the student's view to examples."""

    def velocity_field(self, policy: Policy, examples: list[Example], guidance: float = 1.0) -> VelocityField:
        """Builds the velocity field of a policy for these examples."""

    def ends(self, trajectories: Trajectories) -> Tensor:
        """Returns the last latents ``[B, ...]`` of the trajectories."""


class LearnedScore(TeacherWeights):
    """Weights of another pretrained model, trained on the student's samples before each of its optimizer steps.

    The loss is flow matching's. Weights and optimizer are in the checkpoint. ``global_step`` counts the student's
    updates only. Each update sees all samples of the optimizer step, on all ranks, with fresh noise (DMD2 draws fresh
    samples, too).

    Args:
        pretrained: where it starts; the teacher itself (DMD2).
        optimizer: from parameters to a torch optimizer; should be several times faster than the student's.
        updates: per optimizer step of the student. Default 5 (DMD2, 2405.14867).
        clip: the largest norm of its gradient; None: any. Default 1.

    Raises:
        ValueError: updates < 1, or weights that can't be trained.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        optimizer: OptimizerCallable = default_optimizer,
        updates: int = 5,
        clip: float | None = 1.0,
    ) -> None:
        if updates < 1:
            raise ValueError(f"LearnedScore.updates must be >= 1, got {updates}")
        if pretrained.quantization or pretrained.lora:
            raise ValueError(
                "LearnedScore.pretrained: all its weights are trained; it takes no quantization and no lora"
            )
        self.pretrained, self.optimizer, self.updates, self.clip = pretrained, optimizer, updates, clip
        self._learner: Learner | None = None

    def attach(self, name: str, student: Policy, load: Callable[[Pretrained], Policy]) -> Policy:
        policy = load(self.pretrained)
        self._learner = Learner(policy.model, self.optimizer)
        return policy

    @property
    def state(self) -> nn.Module | None:
        return self._learner

    def before_update(self, name: str, step: OptimizerStep, setting: Samples, ranks: Ranks, done: int) -> Tensor | None:
        """Learns from the student's samples of this optimizer step, if there are any."""
        trajectories = Trajectories.concatenate(step.trajectories, setting.padding)
        acted = (
            trajectories.source == trajectories.sources.index("student")
            if "student" in trajectories.sources
            else trajectories.source < 0
        )
        trajectories = trajectories.select(acted.nonzero().squeeze(-1))
        # its gradients are averaged over ranks: where one has nothing to learn from, none learns
        if self.has_learned(done) or not min(ranks.gather_objects(len(trajectories))):
            return None
        examples = setting.shown(trajectories.examples, trajectories.student_view)
        field = RestrictedField(
            setting.velocity_field(setting.policies[name], examples), torch.arange(len(trajectories))
        )
        seeds = [derived_seed(seed, done) for seed in trajectories.observation["seed"].tolist()]
        return self.learn(field, setting.ends(trajectories), seeds, ranks.mean, done)

    def has_learned(self, step: int) -> bool:
        """Tells whether it was trained for an optimizer step of the student that a resumed run begins again."""
        return self._learner is not None and self._learner.restored_at == step

    def learn(
        self,
        field: RestrictedField,
        clean: Tensor,
        seeds: list[int],
        average: Callable[[Tensor], Tensor],
        step: int,
        low: float = 0.001,
    ) -> Tensor:
        """Trains it on the student's clean samples ``[n, ...]``.

        Args:
            field: the model's, with gradient.
            clean: without gradient.
            seeds: n numbers for the draws.
            average: of a tensor over all ranks.
            step: the student's optimizer steps that are done.
            low: noise levels are uniform between it and 1.

        Returns:
            The mean of its losses, a scalar.
        """
        assert self._learner is not None
        self._learner.learned_at = step
        losses = []
        for update in range(self.updates):
            # 1 and up: 0 is `ScoreDifference`'s
            s, noise = drawn(seeds, clean, low, 1.0, again=1 + update)
            with torch.enable_grad(), self._learner.training_it() as parameters:
                predicted = field(flow.noised(clean, noise, s).to(clean.dtype), s, s)
                loss = (predicted.float() - flow.velocity(clean, noise).float()).square().mean()
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                # by hand: to DDP these parameters are frozen
                parameter.grad = None if gradient is None else average(gradient)
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, self.clip)
            self._learner.optimizer.step()
            self._learner.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return torch.stack(losses).mean()


class Learner(nn.Module):
    """Model and optimizer, as one entry of a checkpoint."""

    def __init__(self, model: nn.Module, optimizer: OptimizerCallable) -> None:
        super().__init__()
        self.model, self._make = model, optimizer
        built = optimizer(list(model.parameters()))
        self.settings, self.optimizer = settings_of(built), in_place(built)
        self.learned_at = self.restored_at = -1  # optimizer steps of the student that were done

    def training_it(self) -> Any:
        """Turns gradients of the model on within a block, which gets its parameters."""
        return _Training(self.model)

    def get_extra_state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "made_with": self.settings, "learned_at": self.learned_at}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        check_settings("LearnedScore.optimizer", self._make, state["made_with"], self.settings)
        self.optimizer.load_state_dict(state["optimizer"])
        apply_settings(self.optimizer, state["made_with"], self.settings)
        self.learned_at = self.restored_at = state["learned_at"]


class _Training:
    """Block in which parameters require gradients, and only there: DDP then ignores them, like a frozen teacher's."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> list[nn.Parameter]:
        self._model.requires_grad_(True)
        return list(self._model.parameters())

    def __exit__(self, *_: Any) -> None:
        self._model.requires_grad_(False)
