"""EarlyStopRollout: how far rollouts go, and how much of them is trained.

Shape legend: B trajectories, T steps (padded), n trained steps of one trajectory.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from ..distribution import CategoricalChunk
from ..module import OnPolicyDistillation
from ..objective import Divergence, ReverseKL
from ..objective.steps import OpenSteps
from ..optimizer_step import MicroBatch, OptimizerStep
from ..rollout import RolloutCallback, derived_seed
from ..trajectory import Trajectories
from .knobs import KnobCallback

HORIZON = "rollout.horizon"
PROBE_DRAWS = 2**33  # keeps the probe's seeds apart from the rollouts' and evaluation's


class StopRule:
    """Where rollouts end. One that knows it beforehand sets ``horizon``; one that must see them says what to `keep`.

    Attributes:
        knobs: the horizon's path for a rule that sets it, so that nobody else turns it.
        horizon: steps after which generation ends; None: the rule leaves that to others.
        teacher: an entry of ``model.teachers`` whom it asks, if any.
    """

    knobs: tuple[str, ...] = ()
    horizon: int | None = None
    teacher: str | None = None

    def begin(self, module: OnPolicyDistillation, longest: int) -> None:
        """Told of the run, whose rollouts may have ``longest`` steps. Raises ValueError for what it can't work with."""

    def keep(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Tensor | None:
        """``[B]`` how many of the trained steps of each trajectory stay trained, from the first on; None: all."""
        return None

    def observe(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        """Told of every optimizer step after it."""

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class FirstSteps(StopRule):
    """ESR (2605.27028): nothing beyond the first N steps is generated at all, at every optimizer step alike.

    Args:
        steps: N. Default 100, for tokens (the paper's; 50 where teacher and student are of different families).

    Raises:
        ValueError: steps < 1.
    """

    knobs = (HORIZON,)

    def __init__(self, steps: int = 100) -> None:
        if steps < 1:
            raise ValueError(f"FirstSteps.steps must be >= 1, got {steps}")
        self.steps = steps

    def begin(self, module: OnPolicyDistillation, longest: int) -> None:
        self.horizon = min(self.steps, longest)


class AdaptiveWindow(StopRule):
    """A window that a probe widens or narrows, after the idea of ADWIN (2605.28396).

    Every so often some prompts are rolled out in full, and the gradient of their first ``horizon`` steps is compared
    with that of all of them. Where they don't point the same way, the window grows by a factor; where a window smaller
    by that factor does as well, it shrinks to that. The window is one number for all trajectories. The paper's update
    rule, its threshold and its staleness control are not public: this rule is ours.

    A probe costs two gradients in memory, and a full rollout with three training passes at most in time.

    Args:
        smallest: of the window, and its start.
        every: optimizer steps between probes. Default 10.
        probe: trajectories of a probe, at most one optimizer step's, on each rank. Default 64 (the paper's).
        agreement: cosine from which on the directions count as one. Default 0.9.
        factor: by which the window grows and shrinks. Default 2.

    Raises:
        ValueError: a value out of range; when training begins, a strategy that shards the student.
    """

    knobs = (HORIZON,)

    def __init__(
        self, smallest: int = 16, every: int = 10, probe: int = 64, agreement: float = 0.9, factor: float = 2.0
    ) -> None:
        if min(smallest, every, probe) < 1 or not -1 <= agreement <= 1 or factor <= 1:
            raise ValueError(
                f"AdaptiveWindow: smallest={smallest}, every={every} and probe={probe} must be >= 1, "
                f"agreement={agreement} in [-1, 1] and factor={factor} > 1"
            )
        self.smallest, self.every, self.probe = smallest, every, probe
        self.agreement, self.factor = agreement, factor

    def begin(self, module: OnPolicyDistillation, longest: int) -> None:
        if not isinstance(module.trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            name = type(module.trainer.strategy).__name__
            raise ValueError(f"AdaptiveWindow: {name} shards the student, whose gradients can't be compared then")
        self.longest = longest
        self.horizon = min(self.horizon or self.smallest, longest)

    def observe(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        assert self.horizon is not None
        if module.global_step % self.every:
            return
        examples = [example for trained in step.trajectories for example in trained.examples][: self.probe]
        group = torch.cat([trained.group for trained in step.trajectories])[: self.probe].cpu()
        seeds = [derived_seed(PROBE_DRAWS, module.global_step, module.global_rank, i) for i in range(len(examples))]
        rollout = dataclasses.replace(module.rollout, horizon=self.longest)
        rolled = module.act("student", examples, seeds, rollout).to("cpu")
        sources = ("student", *(name for name in module.rollout.behavior if name != "student"))
        full = module.with_rewards(dataclasses.replace(rolled, group=group, sources=sources))
        direction = module.gradient(full)
        agreement = _cosine(module.gradient(full.truncate(self.horizon)), direction)
        module.record("early_stop/agreement", agreement)
        smaller = max(self.smallest, int(self.horizon / self.factor))
        if agreement < self.agreement:
            self.horizon = min(self.longest, math.ceil(self.horizon * self.factor))
        elif _cosine(module.gradient(full.truncate(smaller)), direction) >= self.agreement:
            self.horizon = smaller

    def state_dict(self) -> dict[str, Any]:
        return {"horizon": self.horizon}


class ChangePoint(StopRule):
    """Prefix Teach, Suffix Fade (2605.13643): only what comes before a lasting drop of the teacher's margin is trained.

    Means over blocks of steps are split in two where that explains them best; the split counts if the Bayesian
    information criterion prefers it, n·log(RSS₁/n) + 3·log n < n·log(RSS₀/n) + log n for n blocks, and the mean falls.
    The paper averages over sentences, which other settings don't have, and its formula of the margin is not public:
    here it is the difference between the teacher's two largest probabilities among the student's top k. The criterion
    is that of an independent re-implementation.

    The rollout is generated in full, and asks student and teacher once more.

    Args:
        signal: ``margin``; or the teacher's ``confidence``, max q, whose decay is what "Supervision Fidelity Decay"
            (2605.30833) reports; or ``log_prob``, log q of the step taken, which also continuous steps have.
        block: steps per block. Default 16.
        candidates: k of the margin. Default 16.
        fewest: blocks on either side of a split. Default 3.
        teacher: an entry of ``model.teachers``.

    Raises:
        ValueError: a value out of range; when training begins, a teacher or a vocabulary that the run doesn't have.
    """

    def __init__(
        self,
        signal: Literal["margin", "confidence", "log_prob"] = "margin",
        block: int = 16,
        candidates: int = 16,
        fewest: int = 3,
        teacher: str = "teacher",
    ) -> None:
        if min(block, fewest) < 1 or candidates < 2:
            raise ValueError(
                f"ChangePoint: block={block} and fewest={fewest} must be >= 1, candidates={candidates} >= 2"
            )
        if signal not in ("margin", "confidence", "log_prob"):
            raise ValueError(f"ChangePoint.signal is margin, confidence or log_prob, not {signal!r}")
        self.signal, self.block, self.candidates, self.fewest = signal, block, candidates, fewest
        self.teacher = teacher

    def begin(self, module: OnPolicyDistillation, longest: int) -> None:
        if self.signal != "log_prob" and "categorical" not in module.provides:
            raise ValueError(
                f"ChangePoint.signal={self.signal} needs a vocabulary, which this setting doesn't have; use log_prob"
            )

    def keep(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Tensor:
        values = module.per_step(trajectories, self._read, self.teacher)
        rows = zip(values, trajectories.mask, trajectories.length.tolist(), strict=True)
        return torch.tensor([self._cut(row[mask], length) for row, mask, length in rows])

    def _read(self, steps: OpenSteps) -> Tensor:
        if self.signal != "margin":
            return steps.statistic("teacher/peak" if self.signal == "confidence" else f"teacher/{self.signal}")
        assert isinstance(steps.student, CategoricalChunk)
        log_p = steps.student.log_probs()
        candidates = log_p.topk(min(self.candidates, log_p.shape[-1])).indices
        best = steps.teacher.log_probs().gather(-1, candidates).exp().topk(2).values
        return best[:, 0] - best[:, 1]

    def _cut(self, values: Tensor, length: int) -> int:
        """Steps before the change point of ``values [n]``; all of them if there is none."""
        if values.isnan().any():
            return length
        blocks = torch.stack([part.mean() for part in values.double().split(self.block)]) if length else values
        split = falls_at(blocks, self.fewest)
        return length if split is None else split * self.block


def falls_at(values: Tensor, fewest: int) -> int | None:
    """How many of ``values [n]`` come before a single step down that BIC accepts; None: there is none.

    Args:
        fewest: values on either side of the step.
    """
    n = len(values)
    if n < 2 * fewest:
        return None
    splits = torch.arange(fewest, n - fewest + 1)
    total, squares = values.cumsum(0), values.square().cumsum(0)
    before, after = total[splits - 1] / splits, (total[-1] - total[splits - 1]) / (n - splits)
    flat = squares[-1] - total[-1].square() / n
    stepped = squares[-1] - splits * before.square() - (n - splits) * after.square()
    best = int(stepped.argmin())
    least = 1e-12 * float(squares[-1]) + 1e-30  # rounding leaves no more than this of a perfect fit

    def bic(rss: Tensor, parameters: int) -> float:
        return n * math.log(max(float(rss), least) / n) + parameters * math.log(n)

    accepted = before[best] > after[best] and bic(stepped[best], 3) < bic(flat, 1)
    return int(splits[best]) if accepted else None


class LowCorrection(StopRule):
    """KAT (2606.09471): a trajectory is cut where the teacher no longer corrects the student.

    A long run of very low divergence means that both agree on a state that can't be mended. With z_t the mean
    divergence of the ``window`` steps up to t, the cut comes when z is below a threshold for ``patience`` steps on end,
    from step ``skip + window`` on. The threshold is the (1 − eta) quantile of the smallest z of recent trajectories of
    all ranks.

    The paper stops within the rollout; here rollouts are generated in full and the rest is masked, which trains the
    same steps but saves only training time. Student and teacher are asked once more.

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

    Raises:
        ValueError: a value out of range; when training begins, a teacher that the run doesn't have.
    """

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
    ) -> None:
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
        self.seen: list[float] = []

    def keep(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Tensor:
        values = module.per_step(trajectories, self.divergence, self.teacher)
        active = module.global_step >= self.warmup and len(self.seen) >= self.ready
        threshold = float(torch.tensor(self.seen).quantile(1 - self.eta)) if active else -math.inf
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

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}


class EarlyStopRollout(KnobCallback, RolloutCallback):
    """Ends rollouts early: not generated where the rule knows beforehand, not trained where it has to look.

    Evaluation keeps the horizon that was configured, and no rule goes beyond it. Rewards are those of what was
    generated. Logged: ``train/early_stop/kept``, the share of generated steps that is trained, and
    ``train/early_stop/cut``, the share of trajectories that lost some; for a horizon, ``knob/rollout.horizon``.

    Args:
        rule: `FirstSteps`, `AdaptiveWindow`, `ChangePoint` or `LowCorrection`.

    Raises:
        ValueError: when training begins: the rule can't work with this run.
    """

    def __init__(self, rule: StopRule) -> None:
        self.rule = rule

    @property
    def knobs(self) -> tuple[str, ...]:
        return self.rule.knobs

    @property
    def state_key(self) -> str:
        return self._generate_state_key(rule=type(self.rule).__name__)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        assert isinstance(pl_module, OnPolicyDistillation)
        if stage != "fit":
            return
        who, known = self.rule.teacher, sorted(pl_module.teachers)
        if who is not None and who not in known:
            raise ValueError(f"{type(self.rule).__name__}.teacher: no {who!r} in model.teachers, which has {known}")
        self.rule.begin(pl_module, pl_module.rollout.horizon)

    def advance(self, trainer: L.Trainer, module: OnPolicyDistillation) -> None:
        if self.rule.horizon is not None:
            self.turn(HORIZON, self.rule.horizon)

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        kept = self.rule.keep(module, trajectories)
        if kept is None:
            return trajectories
        mask, length = trajectories.mask, trajectories.length
        module.record("early_stop/kept", kept.double(), length.double())
        module.record("early_stop/cut", (kept < length).double())
        return dataclasses.replace(
            trajectories,
            mask=mask & (mask.cumsum(1) <= kept[:, None]),
            stopped=trajectories.stopped & (kept == length),
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: MicroBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, OnPolicyDistillation)
        if batch.is_last:
            self.rule.observe(pl_module, batch.step)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def state_dict(self) -> dict[str, Any]:
        return self.rule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rule.load_state_dict(state_dict)


def _cosine(left: list[Tensor], right: list[Tensor]) -> float:
    """Of two gradients; 1 where one of them is zero, since then there is nothing to disagree about."""

    def dot(a: list[Tensor], b: list[Tensor]) -> float:
        return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))

    size = math.sqrt(dot(left, left) * dot(right, right))
    return dot(left, right) / size if size else 1.0
