"""A setting without tokens: a point walks in the plane by Gaussian steps. Real training, in milliseconds.

Shape legend: B trajectories, T steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from opd_lightning.checkpoint import Checkpoint
from opd_lightning.distribution import Gaussian
from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.module import OnPolicyDistillation
from opd_lightning.objective import Objective, ReverseKL, Term
from opd_lightning.policy import Policy, View
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import Frozen, Teacher
from opd_lightning.trajectory import Example, Trajectories
from tests.tiny import Rows, make_trainer

SCALE = 0.3


class Mover(nn.Module):
    """From where it is and what it was told, ``[…, 2]`` each, to the mean of its next step ``[…, 2]``."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    @classmethod
    def from_pretrained(cls, path: str, **_: Any) -> Mover:
        return cls(int(path))

    def forward(self, place: Tensor, told: Tensor) -> Tensor:
        return self.layers(torch.cat([place, told.expand_as(place)], -1))


class Moves(OnPolicyDistillation):
    """A rollout stops by itself within 0.5 of the origin; the reward is 1 where it ends within 1 of it."""

    model_class, provides = Mover, frozenset[str]()

    def collate(self, examples: list[Example], policy: Policy) -> dict[str, Tensor]:
        return {name: torch.tensor([example[name] for example in examples]) for name in ("start", "told")}

    def sample(
        self,
        policy: Policy,
        prompts: dict[str, Tensor],
        examples: list[Example],
        rollout: Rollout,
        seeds: list[int],
    ) -> Trajectories:
        draws = [torch.randn(rollout.horizon, 2, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        place, steps, running, mask = prompts["start"], [], torch.ones(len(seeds), dtype=torch.bool), []
        for noise in torch.stack(draws, 1):
            steps.append(policy.model(place, prompts["told"]) + SCALE * rollout.temperature * noise)
            mask.append(running)
            place = place + steps[-1]
            running = running & (place.norm(dim=1) >= 0.5)
        acted = Trajectories(
            prompts,
            torch.stack(steps, 1),
            torch.stack(mask, 1),
            examples,
            ~running,
            torch.zeros(len(seeds), len(steps)),
        )
        acted.behavior_log_probs = self._log_probs(policy, acted)
        return acted

    def _log_probs(self, policy: Policy, acted: Trajectories) -> Tensor:
        index = torch.arange(acted.mask.numel())
        return self.distribution(policy, acted).at(index).log_prob(acted.actions.flatten(0, 1)).view(acted.mask.shape)

    def distribution(self, policy: Policy, trajectories: Trajectories, view: list[Example] | None = None) -> Gaussian:
        seen = trajectories.observation if view is None else self.collate(view, policy)
        moved = nn.functional.pad(trajectories.actions.cumsum(1)[:, :-1], (0, 0, 1, 0))
        places = seen["start"][:, None] + moved
        return Gaussian(policy.model(places, seen["told"][:, None]), torch.tensor(SCALE))

    def rewards(self, trajectories: Trajectories) -> tuple[Tensor | None, list[dict[str, Any]]]:
        ends = trajectories.observation["start"] + (trajectories.actions * trajectories.mask[..., None]).sum(1)
        shown = [
            {"prompt": example["prompt"], "completion": str(end)}
            for example, end in zip(trajectories.examples, ends.tolist(), strict=True)
        ]
        return (None if self.reward is None else (ends.norm(dim=1) < 1).float()), shown


class Told(View):
    """The teacher is told the way to the origin, which the student has to find out.

    Args:
        strength: of the privilege; 0 tells nothing.
    """

    columns = ("start",)

    def __init__(self, strength: float = 1.0) -> None:
        if strength < 0:
            raise ValueError(f"Told.strength must be >= 0, got {strength}")
        self.strength = strength

    def __call__(self, example: Example) -> Example:
        return {**example, "told": [-self.strength * x for x in example["start"]]}


def make_rows(count: int = 24) -> list[Example]:
    """Places to start from, on a spiral."""
    angles = torch.arange(count) * 2.4
    places = (1 + torch.arange(count) / count)[:, None] * torch.stack([angles.cos(), angles.sin()], 1)
    return [{"prompt": str(i), "start": place, "told": [0.0, 0.0]} for i, place in enumerate(places.tolist())]


def make_module(
    teachers: dict[str, Teacher] | None = None,
    objective: Objective | None = None,
    setting: type[OnPolicyDistillation] = Moves,
    **settings: Any,
) -> Any:
    """Student 0, and unless told otherwise the frozen teacher 1 and KL(student‖teacher)."""
    return setting(
        student=Pretrained("0"),
        teachers=teachers or {"teacher": Teacher(Frozen(Pretrained("1")))},
        objective=objective or Objective([Term(ReverseKL())]),
        rollout=settings.pop("rollout", None) or Rollout(batch_size=8, horizon=6),
        evaluation=settings.pop("evaluation", None) or Evaluation(before=False),
        optimizer=settings.pop("optimizer", None) or (lambda parameters: torch.optim.Adam(parameters, lr=0.01)),
        **settings,
    )


def fit(
    module: Any,
    folder: Path,
    callbacks: Sequence[L.Callback] = (),
    steps: int = 4,
    rows: Sequence[Example] | None = None,
    checkpoint: Path | None = None,
    validation: Sequence[Example] = (),
    **settings: Any,
) -> L.Trainer:
    """Trains for ``steps`` optimizer steps in all, with a checkpoint in ``folder`` after each."""
    saves = Checkpoint(every_n_train_steps=1, dirpath=str(folder), save_top_k=-1)
    quiet = {"enable_checkpointing": True, "val_check_interval": 1, "check_val_every_n_epoch": None} | settings
    trainer = make_trainer(folder, steps, callbacks=[*callbacks, saves], num_sanity_val_steps=0, **quiet)
    data = Rows(make_rows() if rows is None else rows, validation)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return trainer


def assert_resumes(make: Callable[[], tuple[Any, list[L.Callback]]], folder: Path, steps: int = 6, **settings: Any):
    """A run that goes on from any of its checkpoints ends with the same weights, bit for bit, and the same state.

    ``make`` builds a module and its callbacks anew.
    """
    module, callbacks = make()
    fit(module, folder / "whole", callbacks, steps, **settings)
    for done in range(1, steps):
        again, others = make()
        fit(again, folder / f"from{done}", others, steps, checkpoint=folder / "whole" / f"step-{done}.ckpt", **settings)
        for name, weight in module.state_dict().items():
            assert torch.equal(again.state_dict()[name], weight), f"{name} differs after going on from step {done}"
        for mine, theirs in zip(others, callbacks, strict=True):
            torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0, equal_nan=True)
