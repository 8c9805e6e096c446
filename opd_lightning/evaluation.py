"""Validation: the student acts on held-out prompts and is scored."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.table import Table
from torchmetrics import MeanMetric

from .data import Share
from .finite import Finite
from .printable import cell, printable
from .rollout import check_sampling, derived_seed, group_statistics
from .rows import STAND_IN, identified, row_of
from .teacher import Frozen
from .trajectory import Example, Trajectories

if TYPE_CHECKING:
    from .module import OnPolicyDistillation

# Lightning prints names of metrics as rich's markup, and `/` divides them
_IN_NAMES = str.maketrans("[]/", "()|")
EVALUATION_DRAWS = 2**32  # keeps evaluation's seeds apart from the rollouts'


@dataclass
class Evaluation:
    """How `validate`, `test` and `predict` let the student act.

    Args:
        samples: per prompt; with more than one, pass@k is reported beside the mean (k = samples).
        temperature: default 0, greedy; needs to be positive for several samples.
        top_p, top_k, min_p: filters, off by default (the rollout's do not apply here).
        horizon: default: the rollout's as it was configured, whatever callbacks turn it to.
        before: score the student (and the teachers, once) before the first training step.
        show: held-out prompts whose completions go to samples.jsonl at each validation.
        by: one or two columns; accuracy is also reported for each of their values, as ``accuracy/web/icon`` (with
            ``()|`` for ``[]/`` in a value), and `test` prints the table.

    Raises:
        ValueError: several greedy samples, which would be equal; a value out of range; more than two columns.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    horizon: int | None = None
    before: bool = True
    show: int = 3
    by: list[str] = field(default_factory=list)

    __setattr__ = Finite.__setattr__

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"evaluation.samples must be >= 1, got {self.samples}")
        check_sampling("evaluation", self)
        if len(self.by) > 2:
            raise ValueError(f"evaluation.by: a table has at most two columns to go by, got {self.by}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"evaluation.samples={self.samples} greedy samples would be equal; set evaluation.temperature"
            )


def pass_at_k(rewards: torch.Tensor, k: int, threshold: float = 0.5) -> torch.Tensor:
    """Unbiased share of prompts solved within k tries: 1 − C(n−c, k)/C(n, k), for rewards ``[P, n]`` → ``[P]``.

    c of the n samples reached ``threshold`` (Codex, 2107.03374).
    """
    n = rewards.shape[1]
    wrong = n - (rewards >= threshold).sum(1)
    i = torch.arange(k, device=rewards.device)
    return 1 - ((wrong[:, None] - i).clamp(min=0) / (n - i)).prod(1)


class Evaluator:
    """Lets a policy act on batches of examples and averages what came of it, over batches and ranks."""

    def __init__(self, module: OnPolicyDistillation) -> None:
        self.module = module
        self._horizon = module.rollout.horizon
        self.metrics: dict[str, MeanMetric] = {}

    def act(self, who: str, examples: list[Example], batch_idx: int, horizon: int | None = None) -> Trajectories:
        """A policy acts as it does in validation, ``samples`` times for each example, ``horizon`` steps at most
        (default: as many as in validation)."""
        module, settings = self.module, self.module.evaluation
        rollout = dataclasses.replace(
            module.rollout,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            horizon=horizon or settings.horizon or self._horizon,
        )
        repeated = [example for example in examples for _ in range(settings.samples)]
        seeds = [derived_seed(EVALUATION_DRAWS, module.global_rank, batch_idx, i) for i in range(len(repeated))]
        return module.for_evaluation().act(who, repeated, seeds, rollout)

    @torch.no_grad()
    def step(self, stage: str, who: str, examples: list[Example], batch_idx: int) -> None:
        """One batch of held-out examples."""
        module, samples = self.module, self.module.evaluation.samples
        trajectories = self.act(who, examples, batch_idx)
        counts = torch.tensor([STAND_IN not in example for example in trajectories.examples])
        counted = trajectories.select(counts.nonzero().squeeze(-1))
        reward, shown = module.checked_rewards(counted)
        self._update("length", counted.length.float())
        self._update("stopped", counted.stopped.float())
        if reward is not None:
            self._update("abstained", reward.isnan().float())
            self._update("accuracy", reward[~reward.isnan()])
            if samples > 1:
                prompts = reward.view(-1, samples)
                prompts = prompts[~prompts.isnan().any(1)]  # where one abstains nobody knows
                self._update(f"pass@{samples}", pass_at_k(prompts, samples))
            self._update_by_column(counted.examples, reward)
        for row in shown:
            for name, value in row.get("metrics", {}).items():
                self._update(name, torch.tensor(float(value)))
        if batch_idx == 0:
            self._show(stage, who, shown[: module.evaluation.show * samples : samples])
        if who == "student":
            if not counts.all():
                trajectories = dataclasses.replace(trajectories, mask=trajectories.mask & counts[:, None])
                reward = None if reward is None else torch.zeros(len(counts)).masked_scatter(counts, reward)
            self._compare(trajectories, reward, inspect=batch_idx == 0)

    def _update_by_column(self, examples: list[Example], reward: torch.Tensor) -> None:
        columns = self.module.evaluation.by
        for example, value in zip(examples, reward, strict=True):
            if value.isnan():
                continue
            # a row may belong to several groups of a column (OSWorld-G)
            groups = [v if isinstance(v := example.get(column), list) else [v] for column in columns]
            paths = {path[:depth] for path in product(*groups) for depth in range(1, len(path) + 1)}
            paths |= {("*", kind) for group in groups[1:] for kind in group}
            for path in paths:
                self._update("/".join(("accuracy", *map(_named, path))), value)

    def _compare(self, trajectories: Trajectories, reward: torch.Tensor | None, inspect: bool) -> None:
        """KL to every active teacher at the states that the student just visited."""
        module = self.module
        if reward is not None:
            mean, std = group_statistics(reward.cpu(), torch.arange(len(reward)))
            trajectories = dataclasses.replace(trajectories, reward=reward, group_mean=mean, group_std=std)
        trajectories = trajectories.to(module.device)
        if inspect:
            for name, values in module.inspect(trajectories).items():
                self._update(name, values)
        if "categorical" not in module.provides:
            return  # nothing is reported of other families
        streams = module.query_all(trajectories)
        if streams:
            student = module.distribution(module.policies["student"], trajectories)
            averages = module.objective.diagnose(student, streams, trajectories)
            for name, (total, count) in averages.sums.items():
                if count > 0 and "/kl_" in name:
                    self._update(name, total / count, count)

    def _update(self, name: str, value: torch.Tensor, weight: torch.Tensor | float = 1.0) -> None:
        if not value.numel():
            return
        if name not in self.metrics:
            self.metrics[name] = MeanMetric().to(self.module.device)
        self.metrics[name].update(value.to(self.module.device), weight)

    def finish(self, stage: str) -> dict[str, float]:
        """Means over all batches and ranks since the last call."""
        for name in self._names_on_all_ranks():  # computing is collective: every rank must ask for the same ones
            self.metrics.setdefault(name, MeanMetric().to(self.module.device))
        values = {f"{stage}/{name}": float(metric.compute()) for name, metric in sorted(self.metrics.items())}
        self.metrics = {}
        return values

    def _names_on_all_ranks(self) -> list[str]:
        if self.module.trainer.world_size == 1:
            return list(self.metrics)
        everyone: list[Any] = [None] * self.module.trainer.world_size
        torch.distributed.all_gather_object(everyone, list(self.metrics))
        return sorted(set().union(*everyone))

    def table(self, values: dict[str, float]) -> Table | None:
        """Accuracy in % by the columns of ``evaluation.by``, as benchmarks print it."""
        by, start = self.module.evaluation.by, "test/accuracy/"
        if not by:
            return None
        found = {tuple(n.removeprefix(start).split("/")): v for n, v in values.items() if n.startswith(start)}
        if "test/accuracy" in values:
            found["all",] = values["test/accuracy"]
        rows = [path[0] for path in found if len(path) == 1]
        kinds = sorted({path[1] for path in found if len(path) == 2})
        table = Table(title="accuracy in %", title_justify="left")
        for heading in (by[0], *kinds, "all"):
            table.add_column(cell(heading))
        for row in rows:
            cells = [found.get(("*" if row == "all" else row, kind)) for kind in kinds]
            table.add_row(cell(row), *("" if v is None else f"{100 * v:.1f}" for v in (*cells, found[row,])))
        return table

    def before_training(self) -> None:
        """Scores the student, and once the teachers that are not just the student again."""
        data = getattr(self.module.trainer, "datamodule", None)
        examples = getattr(data, "validation", None)
        if examples is None:
            return
        asked = [
            name
            for name, teacher in self.module.teachers.items()
            if teacher.view is not None or isinstance(teacher.weights, Frozen)
        ]
        values: dict[str, float] = {}
        for who in [*asked, "student"]:
            stage = "val" if who == "student" else f"val/{who}"
            seen = list(range(len(examples)))
            if who != "student":
                seen = [i for i in seen if self.module.teachers[who].look(dict(examples[i])) is not None]
            shown = [row_of(examples, i) for i in seen]
            mine = list(Share(shown, self.module.global_rank, self.module.trainer.world_size))
            size = data.validation_batch_size  # type: ignore[union-attr]
            for place, start in enumerate(range(0, len(mine), size)):
                self.module.evaluate(stage, who, mine[start : start + size], place)
            values |= self.module.evaluated(stage)
        for logger in self.module.loggers:
            logger.log_metrics(values, step=self.module.global_step)
        headline = self.module.headline
        found = {name: value for name, value in values.items() if headline in name} or values
        scores = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        rank_zero_info(printable(f"Before training: {scores}"))
        if silent := [name for name, value in values.items() if name.endswith("/abstained") and value == 1]:
            rank_zero_warn(
                printable(
                    f"{', '.join(silent)} is 1: model.reward answered None for every row of data.validation, so "
                    "nothing is scored"
                )
            )

    def _show(self, stage: str, who: str, rows: list[dict[str, Any]]) -> None:
        if self.module.global_rank or self.module.trainer.sanity_checking:
            return
        self.module.folder.mkdir(parents=True, exist_ok=True)
        with (self.module.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": self.module.global_step, "stage": stage, "who": who, **row}) + "\n")

    @torch.no_grad()
    def predict(self, examples: list[Example], batch_idx: int) -> list[dict[str, Any]]:
        """The student's completions of a batch of examples, each with the number, place and answer of its example."""
        trajectories = self.act("student", examples, batch_idx)
        rows = zip(self.module.checked_rewards(trajectories)[1], trajectories.examples, strict=True)
        return [identified(example) | row for row, example in rows if STAND_IN not in example]


def _named(value: Any) -> str:
    """A column's value as part of a metric's name."""
    return printable(value).translate(_IN_NAMES)
