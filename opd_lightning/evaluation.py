"""Validation: the student acts on held-out prompts and is scored."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.table import Table
from torchmetrics import MeanMetric

from .actor import Actor, group_statistics
from .data import Share
from .evaluation_settings import Evaluation
from .objective import Objective
from .printable import cell, printable
from .progress import phase
from .ranks import Ranks
from .reader import Reader
from .rollout_settings import derived_seed
from .rows import STAND_IN, blames_rows, identified, row_of
from .scoring import Scoring
from .setting import Setting
from .splits import rows_of
from .streams import Streams
from .teacher import Elsewhere, Frozen
from .teacher_reading import TeacherReading
from .trajectory import Example, Trajectories

# Lightning prints names of metrics as rich's markup, and `/` divides them
_IN_NAMES = str.maketrans("[]/", "()|")
EVALUATION_DRAWS = 2**32  # keeps evaluation's seeds apart from the rollouts'
LIKELIEST = 5  # of a teacher's steps, which are written down beside each shown one
BATCH_SIZE = 64  # of rows before training, where the data module has no own


def pass_at_k(rewards: torch.Tensor, k: int, threshold: float = 0.5) -> torch.Tensor:
    """Estimates the share of prompts solved within k tries, 1 − C(n−c, k)/C(n, k): ``[P]`` from rewards ``[P, n]``.

    c of the n samples reached ``threshold`` (Codex, 2107.03374).
    """
    n = rewards.shape[1]
    wrong = n - (rewards >= threshold).sum(1)
    i = torch.arange(k, device=rewards.device)
    return 1 - ((wrong[:, None] - i).clamp(min=0) / (n - i)).prod(1)


@dataclass
class Evaluator:
    """Lets a policy act on batches of examples and averages what came of it, over batches and ranks.

    Attributes:
        settings: as configured.
        actor: who acts in training.
        streams: student and teachers.
        objective: whose diagnostics are measured.
        trainer: of the run.
        scoring: how metrics are called.
        metrics: means since the last `finish`, by name.
        restored: optimizer steps of the checkpoint that was loaded; 0 if none was.
    """

    settings: Evaluation
    actor: Actor
    streams: Streams
    objective: Objective
    trainer: Any
    scoring: Scoring
    metrics: dict[str, MeanMetric]
    restored: int = 0

    @property
    def trained(self) -> int:
        """Optimizer steps that the student was trained for; Lightning counts none where it only evaluates."""
        return max(int(self.trainer.global_step), self.restored)

    @property
    def setting(self) -> Setting:
        return self.actor.setting

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.trainer)

    def act(self, who: str, examples: list[Example], batch_idx: int, horizon: int | None = None) -> Trajectories:
        """Rolls a policy out as in validation, ``samples`` times for each example.

        At most ``horizon`` steps; default: as many as in validation."""
        repeated = [example for example in examples for _ in range(self.settings.samples)]
        # by rank and batch, so that draws depend on the number of ranks
        rank = self.trainer.global_rank
        seeds = [derived_seed(EVALUATION_DRAWS, rank, batch_idx, i) for i in range(len(repeated))]
        rollout = self.settings.applied_to(self.actor.rollout, horizon)
        return dataclasses.replace(self.actor, rollout=rollout, held_out=True).act(who, repeated, seeds)

    @blames_rows
    @torch.no_grad()
    def step(self, stage: str, who: str, examples: list[Example], batch_idx: int) -> None:
        """Measures one batch of held-out examples; ``stage`` is "val", "test", or "val/<teacher>" before training."""
        samples = self.settings.samples
        # 1. all act, stand-ins too: ranks keep step
        trajectories = self.act(who, examples, batch_idx)
        counts = torch.tensor([STAND_IN not in example for example in trajectories.examples])
        counted = trajectories.select(counts.nonzero().squeeze(-1))
        reward, rows = self.actor.checked_rewards(counted)
        # 2. means over the rows that count
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
        self._update_metrics(counted.examples, rows)
        # 3. what is written down, and KLs to teachers
        if batch_idx == 0:
            excerpt = rows[: self.settings.show * samples : samples]
            readings = self._readings(trajectories, excerpt) if who == "student" else [{}] * len(excerpt)
            self._show(stage, who, [row | reading for row, reading in zip(excerpt, readings, strict=True)])
        if who == "student":
            if not counts.all():
                # stand-ins stay as rows without steps: a rank that left its pass out would keep the others waiting
                trajectories = dataclasses.replace(trajectories, mask=trajectories.mask & counts[:, None])
                reward = None if reward is None else torch.zeros(len(counts)).masked_scatter(counts, reward)
            self._compare(trajectories, reward, inspect=batch_idx == 0)
        self.setting.measure(stage, who, examples, batch_idx)

    def _readings(self, trajectories: Trajectories, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Notes of the rows that are shown what a teacher makes of each step; empty dicts where none tells.

        Every rank asks, also one whose rows are stand-ins: a pass is collective where weights are shards.
        """
        names = [n for n in self.streams.teachers if n in self.objective.teachers() & self.streams.policies.keys()]
        count = min(self.settings.show * self.settings.samples, len(trajectories))
        if not names or not count or "categorical" not in self.setting.provides:
            return [{}] * len(rows)
        excerpt = trajectories.to("cpu").select(torch.arange(0, count, self.settings.samples))
        reading = TeacherReading(lambda steps: torch.zeros(len(steps.action), device=steps.action.device), LIKELIEST)
        Reader(self.streams, self.objective, self.trainer, len(excerpt)).per_step(excerpt, reading, names[0])
        steps, (log_probs, likeliest) = self.setting.decode_steps(excerpt), reading.of(self.setting, excerpt)
        if steps is None or log_probs is None:
            return [{}] * len(rows)
        return [
            {"steps": steps[i], "teacher_log_probs": log_probs[i], "likeliest": likeliest and likeliest[i]}
            for i in range(len(rows))
        ]

    def _update_by_column(self, examples: list[Example], reward: torch.Tensor) -> None:
        columns = self.settings.by
        for example, value in zip(examples, reward, strict=True):
            if value.isnan():
                continue
            # a row may belong to several groups of a column (OSWorld-G)
            groups = [v if isinstance(v := example.get(column), list) else [v] for column in columns]
            paths = {path[:depth] for path in product(*groups) for depth in range(1, len(path) + 1)}
            # over all values of the first column: the last row of `table`
            paths |= {("*", kind) for group in groups[1:] for kind in group}
            for path in paths:
                self._update("/".join(("accuracy", *map(_named, path))), value)

    def _update_metrics(self, examples: list[Example], rows: list[dict[str, Any]]) -> None:
        """Adds what the setting measured of each row, and ``evaluation.metrics``."""
        for example, row in zip(examples, rows, strict=True):
            for name, value in row.get("metrics", {}).items():
                self._update(name, torch.tensor(float(value)))
            for name, metric in self.settings.metrics.items():
                # beside the columns, what the setting read in the completion
                value = self.scoring(metric, row["completion"], {**row, **example})
                if value is not None:
                    self._update(name, torch.tensor(value))

    def _compare(self, trajectories: Trajectories, reward: torch.Tensor | None, inspect: bool) -> None:
        """Computes the KL to every active teacher at the states that the student just visited."""
        if reward is not None:
            mean, std = group_statistics(reward.cpu(), torch.arange(len(reward)))
            trajectories = dataclasses.replace(trajectories, reward=reward, group_mean=mean, group_std=std)
        trajectories = trajectories.to(self.trainer.strategy.root_device)
        if inspect:
            for name, values in self.setting.inspect(trajectories).items():
                self._update(name, values)
        if "categorical" not in self.setting.provides:
            return  # nothing is reported of other families
        weights = {name: self.streams.teachers[name].weights for name in self.objective.teachers()}
        recorded = {name for name, w in weights.items() if isinstance(w, Elsewhere) and w.recorded}
        streams = self.streams.query_all(weights.keys() - recorded, trajectories)
        if streams:
            averages = self.objective.diagnose(self.streams.student(trajectories), streams, trajectories)
            for name, (total, count) in averages.sums.items():
                if count > 0 and "/kl_" in name:
                    self._update(name, total / count, count)

    def _update(self, name: str, value: torch.Tensor, weight: torch.Tensor | float = 1.0) -> None:
        if value.numel():
            self._mean(name).update(value.to(self.trainer.strategy.root_device), weight)

    def _mean(self, name: str) -> MeanMetric:
        if name not in self.metrics:
            self.metrics[name] = MeanMetric().to(self.trainer.strategy.root_device)
        return self.metrics[name]

    def finish(self, stage: str) -> dict[str, float]:
        """Means over all batches and ranks since the last call, by ``<stage>/<name>``.

        Where nothing is trained also ``step``, under which Lightning logs them: that of the checkpoint.
        """
        # computing is collective: every rank must ask for the same ones
        names = sorted(set().union(*self.ranks.gather_objects(list(self.metrics))))
        values = {f"{stage}/{name}": float(self._mean(name).compute()) for name in names}
        self.metrics.clear()
        if self.trainer.global_step < self.trained:
            values["step"] = float(self.trained)
        return values | self.setting.measured(stage)

    def table(self, values: dict[str, float]) -> Table | None:
        """Formats accuracy in % by the columns of ``evaluation.by``, as benchmarks print it."""
        by, start = self.settings.by, "test/accuracy/"
        if not by:
            return None
        accuracy = {tuple(n.removeprefix(start).split("/")): v for n, v in values.items() if n.startswith(start)}
        if "test/accuracy" in values:
            accuracy["all",] = values["test/accuracy"]
        rows = [path[0] for path in accuracy if len(path) == 1]
        kinds = sorted({path[1] for path in accuracy if len(path) == 2})
        table = Table(title="accuracy in %", title_justify="left")
        for heading in (by[0], *kinds, "all"):
            table.add_column(cell(heading))
        for row in rows:
            cells = [accuracy.get(("*" if row == "all" else row, kind)) for kind in kinds]
            table.add_row(cell(row), *("" if v is None else f"{100 * v:.1f}" for v in (*cells, accuracy[row,])))
        return table

    @property
    def scored_before(self) -> list[str]:
        """Names the teachers that are scored before training: all of this process but the student as it is."""
        return [
            name
            for name, teacher in self.streams.teachers.items()
            if not isinstance(teacher.weights, Elsewhere)
            and (teacher.view is not None or isinstance(teacher.weights, Frozen))
        ]

    def before_training(self) -> None:
        """Scores the student, and once the teachers that are not just the student again."""
        # 1. rows, and who is measured on them
        trainer, teachers, asked = self.trainer, self.streams.teachers, self.scored_before
        examples = rows_of(trainer, "validation", "model.evaluation.before")
        if examples is None:
            return
        size = getattr(trainer.datamodule, "validation_batch_size", BATCH_SIZE)
        rank_zero_info(f"Evaluating before training ({len(examples)} held-out prompts)")
        # 2. a validation of each
        values: dict[str, float] = {}
        for who in [*asked, "student"]:
            stage = "val" if who == "student" else f"val/{who}"
            indices = list(range(len(examples)))
            if who != "student":
                indices = [i for i in indices if teachers[who].look(dict(examples[i])) is not None]
            share = list(Share([row_of(examples, i) for i in indices], trainer.global_rank, trainer.world_size))
            with phase(f"evaluating {who} before training, rows", len(share)) as at:
                for batch_idx, at.done in enumerate(range(0, len(share), size)):
                    self.step(stage, who, share[at.done : at.done + size], batch_idx)
            values |= self.finish(stage)
        # 3. the log, and a line for people
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        headline = {name: value for name, value in values.items() if self.setting.headline in name} or values
        scores = ", ".join(f"{name} {value:.3f}" for name, value in headline.items())
        rank_zero_info(printable(f"Before training: {scores}"))
        if silent := [name for name, value in values.items() if name.endswith("/abstained") and value == 1]:
            rank_zero_warn(
                printable(
                    f"{', '.join(silent)} is 1: model.reward answered None for every row of data.validation, so "
                    "nothing is scored"
                )
            )

    def _show(self, stage: str, who: str, rows: list[dict[str, Any]]) -> None:
        trainer, folder = self.trainer, Path(self.trainer.default_root_dir)
        # one file for all ranks
        if trainer.global_rank or trainer.sanity_checking:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": self.trained, "stage": stage, "who": who, **row}) + "\n")

    @blames_rows
    @torch.no_grad()
    def predict(self, examples: list[Example], batch_idx: int) -> list[dict[str, Any]]:
        """Samples the student's completions of examples, each with the number, place and answer of its example."""
        trajectories = self.act("student", examples, batch_idx)
        rows = zip(self.actor.checked_rewards(trajectories)[1], trajectories.examples, strict=True)
        return [identified(example) | row for row, example in rows if STAND_IN not in example]


def _named(value: Any) -> str:
    """Converts a column's value to a part of a metric's name."""
    return printable(value).translate(_IN_NAMES)
