"""OnPolicyDistillation: the LightningModule that every setting subclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.seed import _set_rng_states
from lightning.pytorch.cli import OptimizerCallable
from rich.console import Console
from torch import Tensor, nn
from torchmetrics import MeanMetric

from . import resume
from .actor import Actor
from .agreement import Agreement, check_agreement
from .audit import audit
from .callback import followers
from .checkpoint_file import plain_rng_states
from .contract import check_methods
from .diagnostics import Averages
from .evaluation import Evaluator
from .evaluation_settings import Evaluation
from .finite import check_finite
from .gauges import Gauges
from .gradient_guard import GradientGuard
from .likeness import check_base, check_self_teachers
from .memory import advising
from .metrics import Metrics, is_logged, over_ranks
from .note import Note, check_notes, memories, offered_by, remember
from .objective import Objective, OpenSteps
from .optimization import LRSchedule, default_optimizer, in_place
from .optimizer_step import MicroBatch
from .policy import View
from .pretrained import Pretrained
from .ranks import Ranks
from .reader import Reader
from .retention import retained, with_reference
from .reward import Reward
from .rollout import EndOfRollouts, RolloutLoader
from .rollout_settings import Rollout, check_limit
from .rows import blames_rows
from .scoring import Scoring
from .setting import Setting
from .sharding import mesh_of, reshard
from .streams import Streams
from .teacher import Elsewhere, Teacher, aligned, check_actors, enter, told
from .trajectory import Example, Trajectories


class OnPolicyDistillation(Setting, L.LightningModule):
    """Trains a student on the states that a behavior policy visited, towards what teachers say there.

    A setting implements `collate`, `sample`, `distribution` and `rewards`, and names the class that loads its models.

    Args:
        student: the model that is trained.
        objective: the terms of the loss.
        teachers: streams that terms name.
        notes: what is found out about rollouts before they are trained, in this order, as columns of their rows.
        rollout: how the behavior policy acts.
        reward: a verifier of completions; needed by parts that read rewards, and for validation accuracy.
        scoring: how the reward is called: its time limit, and what to do when it fails.
        evaluation: how `validate` and `test` let the student act.
        student_view: what the student is shown instead of the example, in training and evaluation (a smaller image, a
            masked region); teachers without a view see the same.
        optimizer: from parameters to a torch optimizer. Default: AdamW at 1e-5.
        schedule: of the learning rate.
        on_nonfinite: what to do about a gradient with NaN or infinity in it: "stop" with an error that names the step,
            or "skip" the optimizer step, whose weights and moments then stay as they are, and count it
            (``train/skipped_steps``, the share of the steps since the last logged one).
        agreement: how rollouts and their replay are compared before the first step.

    Raises:
        TypeError: the setting lacks one of its four methods.
        ValueError: a part of the objective needs something that this run does not offer; the message names both.
    """

    def __init__(
        self,
        student: Pretrained,
        objective: Objective,
        teachers: dict[str, Teacher] | None = None,
        notes: dict[str, Note] | None = None,
        rollout: Rollout | None = None,
        reward: Reward | None = None,
        scoring: Scoring | None = None,
        evaluation: Evaluation | None = None,
        student_view: View | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        schedule: LRSchedule | None = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        agreement: Agreement | None = None,
    ) -> None:
        super().__init__()
        check_methods(self)
        self.objective, self.notes = objective, notes or {}
        self.rollout, self.reward, self.scoring = rollout or Rollout(), reward, scoring or Scoring()
        self.evaluation, self.schedule = evaluation or Evaluation(), schedule or LRSchedule()
        self.teachers = with_reference(self.evaluation, teachers or {})
        self.evaluation.go_as_far_as(self.rollout)
        self._student_spec, self._optimizer, self.student_view = student, optimizer, student_view
        self.on_nonfinite, self.agreement = on_nonfinite, agreement or Agreement()
        self.strict_loading = False  # frozen weights are not in the checkpoint; `on_load_checkpoint` checks the rest
        self.metrics, self.history = Metrics(), resume.History()
        self.streams = Streams(self, self.teachers, self.metrics.stopwatch)
        self.policies, self.teacher_state = self.streams.policies, self.streams.state
        self.elsewhere = self.streams.elsewhere
        self.parts = self.objective.modules()
        self.loader: RolloutLoader | None = None
        self._measured: dict[str, MeanMetric] = {}
        self._recorded: dict[str, Tensor] = {}
        self._rng: dict[str, Any] | None = None
        self.check()

    # -- rooms --------------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> Ranks:
        """Collectives over all ranks."""
        return Ranks(self._trainer)  # Lightning's `trainer` raises where there is none

    @property
    def actor(self) -> Actor:
        """Who acts in training."""
        precision = nullcontext if self._trainer is None else self.trainer.precision_plugin.forward_context
        return Actor(self, self.policies, self.rollout, self.student_view, precision)

    @property
    def evaluator(self) -> Evaluator:
        """Who measures the student on held-out prompts."""
        rooms = self.actor, self.streams, self.objective, self.trainer, self.scoring
        return Evaluator(self.evaluation, *rooms, self._measured, self.history.step)

    @property
    def reader(self) -> Reader:
        """Who reads trajectories before they are trained."""
        size, _ = self.rollout.micro_batches(self.trainer.accumulate_grad_batches)
        return Reader(self.streams, self.objective, self.trainer, size)

    # -- building -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Checks that the parts fit together, as the knobs are now.

        Who acts, who is asked and what is provided is known once callbacks are: when there is a trainer.

        Raises:
            ValueError: a part needs something that this run does not offer; the message names both.
        """
        enter(self.teachers)
        check_finite("model", {name: value for name, value in vars(self).items() if not name.startswith("_")})
        self.evaluation.check(self.has_rewards, self.provides)
        self.rollout.check(set(self.teachers), self.provides)
        check_notes(self.notes, {*self.columns, *self.reads}, self)
        elsewhere = {name for name, teacher in self.teachers.items() if isinstance(teacher.weights, Elsewhere)}
        self.objective.check({*self.teachers}, None, None, told(self.teachers), elsewhere, aligned(self.teachers))
        if self._trainer is not None:
            self._check_served()

    def _check_served(self) -> None:
        """Checks that callbacks and setting serve the objective's needs, and that every teacher is used."""
        callbacks, notes = followers(self.trainer) + retained(self.evaluation, self.trainer), self.notes.values()
        sources = self.rollout.sources.union(*(c.sources for c in callbacks), *(note.sources for note in notes))
        provides = {*self.provides, *offered_by(self.notes)}.union(*(callback.provides for callback in callbacks))
        offered = {"reward": self.has_rewards, "group": self.rollout.group_size > 1}
        offered["behavior"] = "dataset" not in sources
        provides |= {name for name, is_offered in offered.items() if is_offered}
        self.objective.check({*self.teachers}, provides, sources, aligned=aligned(self.teachers))
        distributions = frozenset[str]().union(*(callback.distributions for callback in callbacks))
        check_actors(self.teachers, sources | self.rollout.policies, distributions)
        asked = self.asked_by_parts().union(*(term.teachers for term in self.objective.terms))
        idle = set(self.teachers) - asked.union(sources, self.rollout.policies, *(c.asks for c in callbacks))
        if idle and not any(not term.teachers for term in self.objective.terms):  # SFT leaves them idle
            raise ValueError(f"model.teachers: nobody asks {sorted(idle)}; name them in a term or remove them")

    def configure_model(self) -> None:
        """Loads every policy, once: Lightning calls it at each stage, and checks of the data need it before that."""
        if self.policies:
            return
        self.streams.load(self._student_spec, empty=(mesh := mesh_of(self._trainer)) is not None)
        self.student: nn.Module = self.policies["student"].model
        if mesh is not None:
            if any(True for _ in self.parts.parameters()):
                raise ValueError("objective.terms: the strategy shards the student, not the parameters of parts")
            self.streams.shard(mesh, self.trainer.strategy)  # type: ignore[arg-type]

    def prepare_for_rows(self) -> None:
        """Loads every policy before rows are checked; raises for what no row can help."""
        self.configure_model()

    def setup(self, stage: str) -> None:
        self.configure_model()
        audit(self, self._trainer)
        self.rollout.micro_batches(self.trainer.accumulate_grad_batches)

    def configure_callbacks(self) -> list[L.Callback]:
        # comes first of all, and on every rank: before data are read and models loaded
        self.check()
        if terms := [t for c in followers(self.trainer) for t in c.terms if t not in self.objective.terms]:
            # a setting's checks are about the terms that people wrote
            self.objective = dataclasses.replace(self.objective, terms=[*self.objective.terms, *terms])
            self.parts = self.objective.modules()
        guard = GradientGuard(self.streams, self.on_nonfinite, self.metrics)
        return [EndOfRollouts(), guard, Gauges(), *retained(self.evaluation, self.trainer)]

    def configure_optimizers(self) -> Any:
        reshard(self.student)  # the optimizer must hold slices; passes of the audit left weights gathered
        optimizer = self._optimizer(self.trained_parameters())
        self.history.optimizer = resume.settings_of(optimizer)
        in_place(optimizer)
        schedule = self.schedule.of(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def trained_parameters(self) -> list[nn.Parameter]:
        """Returns what the optimizer trains: parameters of the student, and of parts of the objective."""
        return [p for p in (*self.student.parameters(), *self.parts.parameters()) if p.requires_grad]

    def rollout_loader(self, dataset: Sequence[Example], seed: int = 0) -> RolloutLoader:
        """Makes the training dataloader over some rows; a data module's ``train_dataloader`` returns it.

        Raises:
            ValueError: as in `RolloutLoader`.
        """
        self.loader = RolloutLoader(
            dataset, self.actor, self.reader, self.metrics, self.trainer, seed, before=self.loader
        )
        return self.loader

    # -- for callbacks and settings -----------------------------------------------------------------------------

    def act(self, who: str, examples: list[Example], seeds: list[int], rollout: Rollout | None = None) -> Trajectories:
        """Trajectories of one behavior policy (`Actor.act`), as training has them or with other settings."""
        actor = self.actor if rollout is None else dataclasses.replace(self.actor, rollout=rollout)
        acted = actor.act(who, examples, seeds)
        return dataclasses.replace(acted, weights_version=torch.full_like(acted.row, self.global_step))

    def reward_of(self, completion: Any, example: Example) -> float | None:
        """Returns the reward of a completion, for `rewards`; None where it abstains.

        Rows that are predicted need not have the columns that it reads: it abstains there.
        """
        assert self.reward is not None
        missing = any(example.get(column) is None for column in getattr(self.reward, "columns", ()))
        if missing and self._trainer is not None and self.trainer.predicting:
            return None
        return self.scoring(self.reward, completion, example)

    def per_step(
        self, trajectories: Trajectories, read: Callable[[OpenSteps], Tensor], teacher: str | None = None
    ) -> Tensor:
        """Evaluates ``read``, such as a signal, at every step of a generation batch, ``[B, T]`` (`Reader.per_step`)."""
        return self.reader.per_step(trajectories, read, teacher)

    def total(self, value: float) -> float:
        """Sums over ranks."""
        return self.ranks.total(value)

    def gather(self, values: Tensor) -> Tensor:
        """Concatenates ``[N]`` of every rank; ranks may differ in N."""
        return self.ranks.gather(values)

    def record(self, name: str, values: Tensor | float, counts: Tensor | float | None = None) -> None:
        """Has the mean of ``values`` since the last logged step, over ranks, logged as ``train/<name>``."""
        self.metrics.record(name, values, counts)

    def recorded(self) -> dict[str, float]:
        """Means of what was recorded since the last logged step, over ranks; every rank must ask."""
        return self.metrics.recorded(self.ranks)

    def is_logged(self, step: int) -> bool:
        """Tells whether records are logged after that many optimizer steps."""
        return is_logged(self.trainer, step)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.trainer.default_root_dir)

    # -- training -----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        # what a checkpoint has is of all ranks
        self.metrics.begin(self._recorded if self.global_rank == 0 else {}, self.device)
        self._recorded = {}
        self.streams.keeps = self.rollout.epochs > 1 and mesh_of(self._trainer) is None
        self.streams.place(self.device)

    def on_train_start(self) -> None:
        check_limit(self.trainer)
        noisy = self._student_spec.is_noisy
        check_agreement(self.agreement, self.actor, self.streams, self.objective, self.trainer, noisy)
        if self._rng is not None:
            _set_rng_states(self._rng)  # not earlier: making the loader's iterator draws numbers
            self._rng = None
        self.history.renew(self.trainer)  # Lightning restored both before this hook
        if self.global_step == 0:  # later the two may differ
            check_self_teachers(self.teachers, self.policies, self.probe)
            if self.evaluation.before:
                self.evaluator.before_training()

    @blames_rows
    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        if batch.is_first:
            self.reader.prepare(batch.step)  # Z is a sum over all of its micro-batches
            for name, loss in self.streams.learn(batch.step, self.ranks, self.global_step).items():
                self.record(f"learned/{name}", loss)
        trajectories, stopwatch = batch.trajectories, self.metrics.stopwatch
        streams, diagnose = self.reader.query(batch), self.is_logged(self.global_step + 1)
        if diagnose and "categorical" in self.provides:  # nothing is logged of it otherwise
            streams = self.streams.with_blind(streams, trajectories)
        stopwatch.count("student", int(trajectories.mask.sum()))
        with stopwatch.phase("student"):
            student = self.streams.student(trajectories)
        with stopwatch.phase("objective"), advising(self.objective.chunk_mib):
            output = self.objective(student, streams, trajectories, batch.step.normalizers, diagnose)
        self.metrics.averages.merge(output.metrics)
        self.metrics.describe(trajectories, self.global_step)
        # Lightning divides by the accumulation, and DDP averages over ranks: the normalizer already holds both
        return output.loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.zero_grad()  # Lightning would keep the gradient until the next one is there
        self.streams.update(self.global_step + 1)  # Lightning counts the step after this hook

    def on_train_batch_end(self, outputs: Any, batch: MicroBatch, batch_idx: int) -> None:
        if not batch.is_last or not self.is_logged(self.global_step):
            return
        values = self.metrics.of_step(self.ranks)
        self.metrics.begin({}, self.device)
        in_bar = [name for name in values if name.startswith("train/loss/") or name == "train/reward"]
        self.log_dict({name: values.pop(name) for name in in_bar}, prog_bar=True)
        self.log_dict(values)

    # -- evaluation ---------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        self.streams.place(self.device)

    on_test_start = on_validation_start

    def validation_step(self, examples: list[Example], batch_idx: int) -> None:
        self.evaluator.step("val", "student", examples, batch_idx)

    def on_validation_epoch_end(self) -> None:
        values = self.evaluator.finish("val")
        if not self.trainer.sanity_checking:
            in_bar = [name for name in ("val/accuracy", "val/length") if name in values][:1]
            # they are those of all ranks: the largest of equal ones, so that Lightning need not doubt it
            self.log_dict({name: values.pop(name) for name in in_bar}, prog_bar=True, sync_dist=True, reduce_fx="max")
            self.log_dict(values, sync_dist=True, reduce_fx="max")

    def test_step(self, examples: list[Example], batch_idx: int) -> None:
        self.evaluator.step("test", "student", examples, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.log_dict(values := self.evaluator.finish("test"), sync_dist=True, reduce_fx="max")
        table = self.evaluator.table(values)
        if table is not None and self.trainer.is_global_zero:
            Console().print(table)

    def predict_step(self, examples: list[Example], batch_idx: int) -> list[dict[str, Any]]:
        return self.evaluator.predict(examples, batch_idx)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = resume.kept_names(self.student, self.state_dict(), self._student_spec)
        checkpoint["state_dict"] = {name: v for name, v in checkpoint["state_dict"].items() if name in kept}
        checkpoint["rng"] = plain_rng_states()
        # at a logged step what was recorded is logged, if it was not yet, after this
        since = Averages() if self.is_logged(self.global_step) else self.metrics.averages
        if self.loader is not None and self.loader.begun is not None and self.loader.unfinished:
            resume.rewind(checkpoint, self.loader.unfinished)
            checkpoint["rng"], since = self.loader.begun.rng, self.loader.begun.averages
        checkpoint["recorded"] = over_ranks(since, self.ranks).state_dict()
        self.history.record(checkpoint, self.student)
        checkpoint["base"], checkpoint["notes"] = self.streams.base, memories(self.notes)
        checkpoint["teachers"] = self.streams.marks

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        spec, state, saved = self._student_spec, self.state_dict(), checkpoint["state_dict"]
        fits = resume.fits(self._trainer)
        marks = self.streams.marks_here
        self.history.check(checkpoint, self.student, self.trained_parameters(), self._optimizer, fits, marks)
        resume.check_complete(resume.kept_names(self.student, state, spec), saved)
        check_base(spec, self.streams.base, checkpoint, fits)
        self.streams.check_elsewhere(checkpoint, fits)
        resume.check_shapes(spec.path, state, saved)
        self._rng, self._recorded = checkpoint.get("rng"), checkpoint.get("recorded", {})
        remember(self.notes, checkpoint.get("notes", {}))
        if not fits:  # what is evaluated and exported, where a callback keeps another student than is trained
            saved.update(checkpoint.get("averaged", {}))
