"""LowCorrection: a trajectory is cut where the teacher no longer corrects the student."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...module import OnPolicyDistillation
from ...objective import Divergence, ReverseKL
from ...rollout_settings import derived_seed
from ...sharding import refuse_sharded
from ...trajectory import Trajectories
from .rule import HORIZON, StopRule

PIECES = 7101
"""Which further draws of a trajectory's seed (`derived_seed`) pieces are written with."""


class LowCorrection(StopRule):
    """KAT (2606.09471): a trajectory is cut where the teacher no longer corrects the student.

    A long run of very low divergence means that both agree on a state that can't be mended. With z_t the mean
    divergence of the ``window`` steps up to t, the cut comes when z is below a threshold for ``patience`` steps on end,
    from step ``skip + window`` on. The threshold is the (1 − eta) quantile of the smallest z of recent trajectories of
    all ranks.

    The paper stops within the rollout. So do rollouts that are written in pieces: behind each of them student and
    teacher read those that go on, from their beginnings, and those that are cut are written no further. Without pieces
    rollouts are generated in full and the rest is masked, which saves only training time. Student and teacher are asked
    once more.

    Args:
        window: W. Default 64. This and the other defaults are the paper's, for tokens.
        skip: L₀, steps that are never cut. Default 16.
        patience: T. Default 4.
        eta: larger cuts less. Default 0.3.
        buffer: trajectories that the quantile looks back on. Default 4096.
        ready: how many it needs before anything is cut. Default 512.
        warmup: optimizer steps before anything is cut. Default 50.
        back_up: cut at the start of the run's first window, as the paper's text has it; otherwise where the run is
            noticed, as its pseudocode has it.
        divergence: of student and teacher at a step. Default: KL(student‖teacher) over the whole vocabulary; the
            paper's is that over the top 64 and the rest.
        teacher: an entry of ``model.teachers``.
        piece: steps that are written at a time, at least window. Default: all of them.

    Raises:
        ValueError: a value out of range; when training begins, a teacher that the run doesn't have; pieces where
            others than the student act, or in an environment.
    """

    remembers = ("seen",)

    def __init__(
        self,
        window: int = 64,
        skip: int = 16,
        patience: int = 4,
        eta: float = 0.3,
        buffer: int = 4096,
        ready: int = 512,
        warmup: int = 50,
        back_up: bool = True,
        divergence: Divergence | None = None,
        teacher: str = "teacher",
        piece: int | None = None,
    ) -> None:
        if piece is not None and piece < window:
            raise ValueError(f"LowCorrection.piece={piece} is shorter than window={window}, in which nothing is found")
        if min(window, patience, buffer, ready) < 1 or min(skip, warmup) < 0 or not 0 <= eta <= 1:
            raise ValueError(
                f"LowCorrection: window={window}, patience={patience}, buffer={buffer} and ready={ready} must be >= 1, "
                f"skip={skip} and warmup={warmup} >= 0, and eta={eta} in [0, 1]"
            )
        if ready > buffer:
            raise ValueError(f"LowCorrection.ready={ready} could never be reached with buffer={buffer}")
        self.window, self.skip, self.patience, self.eta = window, skip, patience, eta
        self.buffer, self.ready, self.warmup, self.back_up = buffer, ready, warmup, back_up
        self.divergence, self.teacher = divergence or ReverseKL(), teacher
        self.reads_distribution = "distribution" in self.divergence.needs
        self.seen: list[float] = []
        self.piece = piece
        self.knobs = () if piece is None else (HORIZON,)

    def begin(self, module: OnPolicyDistillation, longest: int) -> None:
        if self.piece is None:
            return
        refuse_sharded(module.trainer, "LowCorrection.piece", "whose ranks must act equally often")
        goes_on = "turn" in module.provides and getattr(module, "environment", None) is None
        if module.rollout.sources != {"student"} or not goes_on:
            raise ValueError(
                "LowCorrection.piece: rollouts are written in pieces in settings that write tokens, where the student "
                "alone acts (rollout.behavior), in one turn (no model.environment); leave it out"
            )
        self.longest, self.horizon = longest, min(self.piece, longest)

    def complete(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        if self.piece is None:
            return trajectories
        threshold, number = self._threshold(module), 0
        going = (~trajectories.stopped & (trajectories.extent < self.longest)).nonzero().squeeze(1)
        while len(going):
            number += 1
            # 1. those that are cut are written no further
            some = trajectories.select(going)
            values = module.per_step(some, self.divergence, self.teacher)
            lengths = [self._cut(row[mask].double(), threshold)[0] for row, mask in zip(values, some.mask, strict=True)]
            open_ = torch.tensor(lengths) == some.length
            going, some = going[open_], some.select(open_.nonzero().squeeze(1))
            if not len(going):
                break
            # 2. the others are, by a piece
            seeds = [derived_seed(int(seed), PIECES, number) for seed in some.seed]
            horizon = min(self.longest, (number + 1) * self.piece)
            further = module.actor.go_on("student", some, horizon, seeds)
            trajectories = trajectories.put(going, further, module.padding)
            going = going[~further.stopped & (further.extent < self.longest)]
        return trajectories

    def _threshold(self, module: OnPolicyDistillation) -> float:
        """Returns below which mean divergence nothing is corrected any more; −∞ as long as too little was seen."""
        active = module.global_step >= self.warmup and len(self.seen) >= self.ready
        return float(torch.tensor(self.seen).quantile(1 - self.eta)) if active else -math.inf

    def keep(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Tensor:
        values, threshold = module.per_step(trajectories, self.divergence, self.teacher), self._threshold(module)
        kept: list[int] = []
        lowest: list[float] = []
        for row, mask in zip(values, trajectories.mask, strict=True):
            steps, low = self._cut(row[mask].double(), threshold)
            kept.append(steps)
            lowest += [low] if low is not None else []
        everywhere = module.gather(torch.tensor(lowest, device=module.device))
        self.seen = (self.seen + everywhere.tolist())[-self.buffer :]
        return torch.tensor(kept)

    def _cut(self, values: Tensor, threshold: float) -> tuple[int, float | None]:
        """Steps of ``values [n]`` that are kept, and the smallest z until the cut was noticed, if there is any z."""
        # too short for any z, or the teacher is not defined here
        if len(values) < self.window or values.isnan().any():
            return len(values), None
        z = values.unfold(0, self.window, 1).mean(1)  # z[i] is of the window that ends with step i + window
        run = 0
        for i, low in enumerate((z < threshold).tolist()):
            run = run + 1 if low and i >= self.skip else 0
            if run == self.patience:
                noticed = i + self.window
                first = i - self.patience + 1
                return (first if self.back_up else noticed), float(z[: i + 1].min())
        return len(values), float(z.min())
