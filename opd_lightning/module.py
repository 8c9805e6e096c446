"""OnPolicyDistillation: the LightningModule that every setting subclasses."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.fabric.utilities.seed import _set_rng_states
from lightning.pytorch.cli import OptimizerCallable
from rich.console import Console
from torch import Tensor, nn
from transformers import get_scheduler

from . import resume
from .agreement import Agreement, check_agreement, usual_suspects
from .audit import audit
from .callback import DistillationCallback
from .checkpoint import kept_names, plain_rng_states
from .contract import check_acted, check_methods, check_prompts, check_scores
from .diagnostics import Averages, Stopwatch, forget_logged
from .distribution import Distribution, Stream
from .evaluation import Evaluation, Evaluator
from .finite import Finite, check_finite
from .likeness import check_base, check_self_teachers, fingerprint
from .loading import loading
from .objective import Objective, OpenSteps, Queried, Steps, availability
from .optimizer_step import Cache, CachedStream, MicroBatch, OptimizerStep
from .portable import Portable
from .pretrained import Pretrained
from .reward import Reward
from .rollout import EndOfRollouts, Rollout, RolloutLoader, check_limit, group_statistics
from .rows import blames_rows
from .scoring import Scoring
from .sharding import mesh_of, reshard, shard, unsharded
from .student_view import settings_of, shown
from .teacher import Frozen, Policy, Teacher, View, check_names, evaluating
from .trajectory import Example, Trajectories


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """AdamW, learning rate 1e-5, no weight decay."""
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)


def in_place(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same; torch's Adam and AdamW then update without temporaries, unless ``foreach`` or ``fused`` is set.

    What torch chooses by itself makes two tensors as large as the largest weight, on a GPU as large as all of them.
    """
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        for group in optimizer.param_groups:
            everywhere = all(parameter.device.type in ("cpu", "cuda") for parameter in group["params"])
            if everywhere and group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
                # as an argument of the constructor it would make Lightning refuse to clip in mixed precision
                group["fused"] = True
    return optimizer


@dataclass
class LRSchedule:
    """The learning rate over optimizer steps.

    Args:
        name: of transformers' schedules; ``linear`` and ``cosine`` fall to 0 at trainer.max_steps.
        warmup_steps: linear rise from 0.
    """

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0

    __setattr__ = Finite.__setattr__


class OnPolicyDistillation(Portable, L.LightningModule):
    """Trains a student on the states that a behavior policy visited, towards what teachers say there.

    A setting implements `collate`, `sample`, `distribution` and `rewards`, and names the class that loads its models.

    Args:
        student: the model that is trained.
        objective: the terms of the loss.
        teachers: streams that terms name.
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

    headline: ClassVar[str] = "accuracy"
    """What is printed before training: the metrics with this in their names."""
    columns: ClassVar[tuple[str, ...]] = ("prompt",)
    """Those without which no policy can act on an example."""
    provides: ClassVar[frozenset[str]] = frozenset()
    """What it offers to parts of the objective (`Part.needs`); ``reward``: `rewards` has rewards without a verifier."""
    reads: ClassVar[frozenset[str]] = frozenset({"prompt"})
    """Columns that it reads where rows have them, besides those that its parts name."""
    padding: ClassVar[dict[str, tuple[float, str]]] = {}

    def __init__(
        self,
        student: Pretrained,
        objective: Objective,
        teachers: dict[str, Teacher] | None = None,
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
        check_methods(self, OnPolicyDistillation)
        self.objective, self.teachers = objective, teachers or {}
        self.rollout, self.reward = rollout or Rollout(), reward
        self.scoring = scoring or Scoring()
        self.evaluation, self.schedule = evaluation or Evaluation(), schedule or LRSchedule()
        self._student_spec, self._optimizer, self.student_view = student, optimizer, student_view
        self.on_nonfinite, self.agreement = on_nonfinite, agreement or Agreement()
        self.strict_loading = False  # frozen weights are not in the checkpoint; `on_load_checkpoint` checks the rest
        self.policies: dict[str, Policy] = {}
        self.teacher_state = nn.ModuleDict()
        self.stopwatch, self.config_yaml = Stopwatch(), ""
        self.loader: RolloutLoader | None = None
        self.changes: list[dict[str, Any]] = []
        self.optimizer_settings: dict[str, Any] = {}
        self.restored: dict[str, Any] = {}
        self.evaluator = Evaluator(self)
        self._averages = Averages()
        self._recorded: dict[str, Tensor] = {}
        self._rng: dict[str, Any] | None = None
        self.check()

    # -- the four methods of a setting --------------------------------------------------------------------------

    @abstractmethod
    def collate(self, examples: list[Example], policy: Policy | None = None) -> dict[str, Tensor]:
        """Raw columns to model inputs, as ``policy`` (default: the student) renders them."""

    @abstractmethod
    def sample(
        self,
        policy: Policy,
        prompts: dict[str, Tensor],
        examples: list[Example],
        rollout: Rollout,
        seeds: list[int],
    ) -> Trajectories:
        """``policy`` acts. Draws for trajectory i depend on ``seeds[i]`` alone, not on its neighbors."""

    @abstractmethod
    def distribution(
        self, policy: Policy, trajectories: Trajectories, view: list[Example] | None = None
    ) -> Distribution:
        """What ``policy`` says at every visited state ``[B, T]``; ``view``: the examples as it sees them."""

    @abstractmethod
    def rewards(
        self, trajectories: Trajectories
    ) -> tuple[Tensor | Sequence[float | None] | None, list[dict[str, Any]]]:
        """Rewards, and what to show of each trajectory (``prompt``, ``completion``).

        Rewards are finite numbers, a tensor ``[B]`` or a list with None where one abstains (`reward_of` asks the
        verifier); None without a verifier.
        """

    # -- what a setting may add ---------------------------------------------------------------------------------

    def replay(self, examples: list[Example], seeds: list[int]) -> Trajectories:
        """Given completions as trajectories, for ``rollout.behavior: {dataset: …}``; ``seeds`` as in `sample`."""
        raise NotImplementedError(f"{type(self).__name__} cannot replay dataset completions")

    def refusal(self, example: Example) -> str | None:
        """Why this example cannot be used (too long a prompt, …), or None."""
        return None

    def inspect(self, trajectories: Trajectories) -> dict[str, Tensor]:
        """Further validation metrics, a value per trajectory ``[B]`` each; asked for one batch of each validation."""
        return {}

    @blames_rows
    def evaluate(self, stage: str, who: str, examples: list[Example], batch_idx: int) -> None:
        """Measures one batch of held-out examples; ``stage`` is "val", "test", or "val/<teacher>" before training."""
        self.evaluator.step(stage, who, examples, batch_idx)

    def evaluated(self, stage: str) -> dict[str, float]:
        """What `evaluate` measured since the last call, over all batches and ranks, by ``<stage>/<name>``."""
        return self.evaluator.finish(stage)

    def for_evaluation(self) -> OnPolicyDistillation:
        """What acts in evaluation: the same with other settings, where those of training make no sense there."""
        return self

    def asked_by_parts(self) -> set[str]:
        """Teachers that no term names, but other parts of the setting ask."""
        return set()

    def release(self) -> None:
        """Gives back what it holds outside of this process; comes at the end of every stage, however it ends."""

    def decode_steps(self, trajectories: Trajectories) -> list[list[str]] | None:
        """What each trained step of each trajectory wrote, for people; None where steps can't be read."""
        return None

    def audit_rows(self) -> list[tuple[str, dict[str, str]]]:
        """Rows of the start-up table: what, and its value for each role. Raises for what cannot work."""
        return []

    def readings(self, example: Example) -> list[tuple[str, str]]:
        """What is made of a row, for people to look at before training: whose reading, and what it is."""
        return []

    @property
    def acting_tolerance(self) -> float:
        """How far log-probs of acting may be from those of a replay, in nats, beyond what rounding does."""
        return 0.0

    def suspects(self, policy: Policy, what: str) -> list[str]:
        """What may make a policy disagree with itself in one of the comparisons before training, for its message."""
        return usual_suspects(self, what)

    # -- building -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Whether the parts fit together, as the knobs are now.

        Who acts, who is asked and what is provided is known once callbacks are: when there is a trainer.

        Raises:
            ValueError: a part needs something that this run does not offer; the message names both.
        """
        check_names(self.teachers)
        for name, teacher in self.teachers.items():
            teacher.name = name
        check_finite("model", {name: value for name, value in vars(self).items() if not name.startswith("_")})
        if self.evaluation.by and not self.has_rewards:
            raise ValueError("evaluation.by breaks accuracy down, which needs a verifier: set model.reward")
        for name in sorted(self.rollout.sources - {"student", "dataset"} - set(self.teachers)):
            raise ValueError(
                f"rollout.behavior names '{name}', which is no entry of model.teachers: {sorted(self.teachers)}"
            )
        self.objective.check(set(self.teachers))
        if self._trainer is not None:
            self._check_served()

    @property
    def callbacks(self) -> list[DistillationCallback]:
        """Callbacks of the trainer that follow its optimizer steps, in its order."""
        everyone: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in everyone if isinstance(callback, DistillationCallback)]

    def _check_served(self) -> None:
        """Whether callbacks and settings together serve what the objective needs, and need what there is."""
        sources = self.rollout.sources.union(*(callback.sources for callback in self.callbacks))
        provides = set(self.provides).union(*(callback.provides for callback in self.callbacks))
        if self.has_rewards:
            provides.add("reward")
        if self.rollout.group_size > 1:
            provides.add("group")
        if "dataset" not in sources:
            provides.add("behavior")
        self.objective.check(set(self.teachers), provides, sources)
        asked = self.asked_by_parts().union(*(term.teachers for term in self.objective.terms))
        idle = set(self.teachers) - asked.union(sources, *(callback.asks for callback in self.callbacks))
        if idle and not any(not term.teachers for term in self.objective.terms):
            raise ValueError(f"model.teachers: nobody asks {sorted(idle)}; name them in a term or remove them")

    def required_columns(self) -> dict[str, str]:
        """Canonical column → who needs it."""
        needed = dict.fromkeys(self.columns, "the rollout")

        def need(column: str, who: str) -> None:
            needed[column] = f"{needed[column]}, {who}" if column in needed else who

        if "dataset" in self.rollout.sources:
            need("completion", "rollout.behavior.dataset")
        for column in getattr(self.reward, "columns", ()):
            need(column, "model.reward")
        for column in self.evaluation.by:
            need(column, "model.evaluation.by")
        for column in self.student_view.columns if self.student_view else ():
            need(column, "model.student_view")
        for name, teacher in self.teachers.items():
            for column in (*(teacher.view.columns if teacher.view else ()), *teacher.where):
                need(column, f"model.teachers.{name}")
        return needed

    def configure_model(self) -> None:
        """Loads every policy, once: Lightning calls it at each stage, and checks of the data need it before that."""
        if self.policies:
            return
        with loading("model.student"):
            model = self._student_spec.load(self.model_class, trained=True)
            student = Policy(model, self.load_processor(self._student_spec), path=self._student_spec.path)
        self.student, self._base = model, "drawn" if self._student_spec.random_init else fingerprint(model)
        self.policies["student"] = student
        for name, teacher in self.teachers.items():
            with loading(f"model.teachers.{name}.weights.pretrained"):
                policy = teacher.weights.attach(name, student, self._load_frozen)
            self.policies[name] = dataclasses.replace(policy, name=name)
            if teacher.weights.state is not None:
                self.teacher_state[name] = teacher.weights.state
        if (mesh := mesh_of(self._trainer)) is not None:
            self._shard(mesh)

    def prepare_for_rows(self) -> None:
        """Loads every policy before rows are checked; raises for what no row can help."""
        self.configure_model()

    def _shard(self, mesh: Any) -> None:
        elsewhere = {name for name, t in self.teachers.items() if isinstance(t.weights, Frozen) and t.weights.device}
        models = {policy.model for name, policy in self.policies.items() if name not in elsewhere}
        for model in models:
            if model is self.student or not getattr(model, "is_quantized", False):
                shard(model, mesh)

    def _load_frozen(self, spec: Pretrained) -> Policy:
        return Policy(spec.load(self.model_class, trained=False), self.load_processor(spec), path=spec.path)

    def setup(self, stage: str) -> None:
        self.configure_model()
        audit(self)
        self.rollout.micro_batches(self.trainer.accumulate_grad_batches)

    def _place_teachers(self) -> None:
        """Frozen teachers are no submodules (they must stay out of optimizer and checkpoint): moved by hand."""
        for name, teacher in self.teachers.items():
            where = (teacher.weights.device if isinstance(teacher.weights, Frozen) else None) or self.device
            model = self.policies[name].model
            if not getattr(model, "is_quantized", False):
                model.to(where)

    def configure_optimizers(self) -> Any:
        reshard(self.student)
        optimizer = self._optimizer([p for p in self.student.parameters() if p.requires_grad])
        self.optimizer_settings = resume.settings_of(optimizer)
        in_place(optimizer)
        total = self.trainer.max_steps
        name: str = self.schedule.name
        if name != "constant" and total < 1:
            raise ValueError(f"model.schedule.name={name} needs trainer.max_steps")
        if name == "constant" and self.schedule.warmup_steps:
            name = "constant_with_warmup"  # transformers' "constant" has none
        schedule = get_scheduler(name, optimizer, self.schedule.warmup_steps, max(total, 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- acting -------------------------------------------------------------------------------------------------

    @blames_rows
    @torch.no_grad()
    def act(self, who: str, examples: list[Example], seeds: list[int], rollout: Rollout | None = None) -> Trajectories:
        """Trajectories of one behavior policy; a teacher acts on what its view shows it.

        The observation is the student's in every case: that is what the loss conditions on.
        """
        if who == "dataset":
            acted = check_acted(self, self.replay(examples, seeds), examples, "replay")
        else:
            # the training dataloader acts outside of Lightning's hooks, but rollout and replay must agree in precision
            with self.trainer.precision_plugin.forward_context() if self._trainer is not None else nullcontext():
                acted = self._act(who, examples, seeds, rollout or self.rollout)
        return dataclasses.replace(
            acted,
            student_view=settings_of(self.student_view),
            sources=(who,),
            seed=torch.tensor(seeds, device=acted.mask.device),
            weights_version=torch.full_like(acted.row, self.global_step),
        )

    def shown(self, examples: list[Example], settings: dict[str, Any] | None = None) -> list[Example]:
        """The examples as the student sees them; ``settings``: as it saw them when its view had these."""
        return shown(self.student_view, examples, settings)

    def _act(self, who: str, examples: list[Example], seeds: list[int], rollout: Rollout) -> Trajectories:
        policy, mine = self.policies[who], self.shown(examples)
        prompts = check_prompts(self, self.collate(mine), mine)
        if who == "student":
            acted = check_acted(self, self.sample(policy, prompts, mine, rollout, seeds), mine)
            return dataclasses.replace(acted, examples=examples)
        seeing = [own if view is None else view for own, view in zip(mine, self._look(who, examples), strict=True)]
        theirs = self.collate(seeing, policy if self.teachers[who].own_template else None)
        acted = check_acted(self, self.sample(policy, theirs, seeing, rollout, seeds), seeing)
        return dataclasses.replace(acted, observation=acted.observation | prompts, examples=examples)

    def _look(
        self, name: str, examples: list[Example], settings: dict[str, Any] | None = None, view: View | None = None
    ) -> list[Example | None]:
        """What a teacher is shown of each example; without a view of its own, what the student sees."""
        teacher = self.teachers[name]
        seen = [teacher.look(example, view) for example in examples]
        if (view or teacher.view) is not None or self.student_view is None:
            return seen
        return [None if look is None else own for look, own in zip(seen, self.shown(examples, settings), strict=True)]

    @property
    def has_rewards(self) -> bool:
        """Whether `rewards` has rewards: of a verifier, or of its own."""
        return self.reward is not None or "reward" in self.provides

    def reward_of(self, completion: Any, example: Example) -> float | None:
        """What the verifier says of a completion, for `rewards`; None where it abstains.

        Rows that are predicted need not have the columns that it reads: it abstains there.
        """
        assert self.reward is not None
        missing = any(example.get(column) is None for column in getattr(self.reward, "columns", ()))
        if missing and self._trainer is not None and self.trainer.predicting:
            return None
        return self.scoring(self.reward, completion, example)

    def checked_rewards(self, trajectories: Trajectories) -> tuple[Tensor | None, list[dict[str, Any]]]:
        """Checks what `rewards` returned: ``[B]`` on the CPU, NaN where one abstains (None: no rewards), and rows."""
        return check_scores(self, self.rewards(trajectories), trajectories)

    @blames_rows
    def with_rewards(self, trajectories: Trajectories) -> Trajectories:
        """The same with rewards and their group statistics, if there are any."""
        if not self.has_rewards:
            return trajectories
        reward, _ = self.checked_rewards(trajectories)
        assert reward is not None
        mean, std = group_statistics(reward, trajectories.group)
        return dataclasses.replace(trajectories, reward=reward, group_mean=mean, group_std=std)

    def query(self, name: str, trajectories: Trajectories, view: View | None = None) -> Stream:
        """Evaluates a teacher at every state, without gradient; ``view``: in place of its own."""
        teacher, policy = self.teachers[name], self.policies[name]
        self.stopwatch.count("teacher", int(trajectories.mask.sum()))
        with torch.no_grad(), evaluating(policy.model), self.stopwatch.phase("teacher"):
            if (view or teacher.view) is None and not teacher.where and not teacher.own_template:
                return Stream(self.distribution(policy, trajectories))
            seen = self._look(name, trajectories.examples, trajectories.student_view, view)
            available = torch.tensor([view is not None for view in seen], device=trajectories.mask.device)
            # where there is no view the student's own prompt keeps the shapes; the term is off there
            mine = self.shown(trajectories.examples, trajectories.student_view)
            seeing = [own if view is None else view for own, view in zip(mine, seen, strict=True)]
            return Stream(self.distribution(policy, trajectories, seeing), available)

    @torch.no_grad()
    def per_step(
        self, trajectories: Trajectories, read: Callable[[OpenSteps], Tensor], teacher: str | None = None
    ) -> Tensor:
        """What ``read`` says of every trained step, ``[B, T]`` on the CPU: a look at a generation batch before it is
        trained, in micro-batches and chunks, without gradient.

        Args:
            trajectories: a generation batch.
            read: from the n steps of an open chunk to ``[n]``; any signal will do.
            teacher: an entry of ``model.teachers``, whom ``steps.teacher`` then stands for.

        Returns:
            NaN where nothing is trained, and where the teacher has nothing to say.
        """
        values, done = torch.full(trajectories.mask.shape, torch.nan, dtype=torch.float32), 0
        size, _ = self.rollout.micro_batches(self.trainer.accumulate_grad_batches)
        for part in trajectories.split(size):
            mine = self._per_step(part.to(self.device), read, teacher)
            values[done : done + len(part), : mine.shape[1]] = mine.cpu()
            done += len(part)
        return values

    def _per_step(self, batch: Trajectories, read: Callable[[OpenSteps], Tensor], teacher: str | None) -> Tensor:
        with self.trainer.precision_plugin.forward_context():
            student, streams, batch = self._read(batch, set() if teacher is None else {teacher})
            return self.objective.per_step(student, streams, Steps.of(batch, availability(streams)), read, teacher)

    # -- training -----------------------------------------------------------------------------------------------

    @blames_rows
    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        if batch.is_first:
            self.prepare(batch.step)
        trajectories, diagnose = batch.trajectories, self._logs_now()
        streams = self.query_all(trajectories, batch.cache)
        if diagnose:
            streams = self._with_blind(streams, trajectories)
        self.stopwatch.count("student", int(trajectories.mask.sum()))
        with self.stopwatch.phase("student"):
            student = self.distribution(self.policies["student"], trajectories)
        with self.stopwatch.phase("objective"), self._advising():
            output = self.objective(student, streams, trajectories, batch.step.normalizers, diagnose)
        self._averages.merge(output.metrics)
        self._describe(trajectories)
        # Lightning divides by the accumulation, and DDP averages over ranks: the normalizer already holds both
        return output.loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    @contextmanager
    def _advising(self) -> Iterator[None]:
        """
        Raises:
            RuntimeError: the memory does not suffice for the objective; the message says what would need less.
        """
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise RuntimeError(
                f"out of memory in the objective, whose chunks take {self.objective.chunk_mib} MiB of logits: lower "
                "model.objective.chunk_mib first, then rollout.micro_batch_size (with more "
                f"trainer.accumulate_grad_batches the result is the same). {error}"
            ) from error

    def query_all(self, trajectories: Trajectories, cache: Cache | None = None) -> dict[str, Stream]:
        """Evaluates every teacher that a term needs now.

        Args:
            trajectories: a micro-batch.
            cache: streams of the same micro-batch; read where they hold, added to where they will be read again.
        """
        return {
            name: self.query(name, trajectories) if cache is None else self._query_once(name, trajectories, cache)
            for name in sorted(self.objective.teachers())
        }

    def _query_once(self, name: str, trajectories: Trajectories, cache: Cache) -> Stream:
        # where weights are cut all ranks must ask or none, but views may have changed for the examples of some
        lasts = self.rollout.epochs > 1 and self.teachers[name].weights.stands_still and mesh_of(self._trainer) is None
        views = self._look(name, trajectories.examples, trajectories.student_view) if lasts else None
        cached = cache.pop(name, None)
        if cached is not None and (cached.step == self.global_step or (lasts and cached.views == views)):
            if lasts:
                cache[name] = cached
            stream = cached.stream.to(trajectories.mask.device)
            assert stream is not None
            return stream
        stream = self.query(name, trajectories)
        if lasts or self.objective.needs_totals:
            kept = stream.to("cpu")
            if kept is not None:
                cache[name] = CachedStream(kept, self.global_step, views)
        return stream

    @torch.no_grad()
    def _with_blind(self, streams: dict[str, Stream], trajectories: Trajectories) -> dict[str, Stream]:
        """Adds what teachers with a view say without it, for the log."""
        if "categorical" not in self.provides:
            return streams  # nothing is logged of it
        blind = dict(streams)
        for name, stream in streams.items():
            if self.teachers[name].view is not None:
                with evaluating(self.policies[name].model):
                    without_view = self.distribution(self.policies[name], trajectories)
                blind[name] = dataclasses.replace(stream, without_view=without_view)
        return blind

    @torch.no_grad()
    def prepare(self, step: OptimizerStep) -> None:
        """Moves an optimizer step to the device and finds what the losses of its micro-batches are divided by."""
        step.trajectories = [trajectories.to(self.device) for trajectories in step.trajectories]
        student = self.policies["student"]
        queried = (
            (self.distribution(student, batch.trajectories), self.query_all(batch.trajectories, batch.cache))
            for batch in step
        )
        sums = self.objective.weight_sums(queried, step.trajectories)
        teachers = self.objective.routed_teachers()
        batches = [(trajectories, self._available(trajectories, teachers)) for trajectories in step.trajectories]
        step.normalizers = self.objective.normalizers(batches, sums, self.total)

    @torch.no_grad()
    def settle(self, trajectories: Trajectories) -> Trajectories:
        """Evaluates the parts of the objective that see a whole generation batch, before it is trained."""
        if not self.objective.generation_parts():
            return trajectories
        teachers, width = self.objective.generation_streams(), trajectories.mask.shape[1]
        size, _ = self.rollout.micro_batches(self.trainer.accumulate_grad_batches)
        pieces = trajectories.split(size) if teachers is not None else ()
        with self.trainer.precision_plugin.forward_context():
            statistics = self.objective.measure((self._read(piece, teachers or set()) for piece in pieces), width)

        def everywhere(values: Tensor) -> Tensor:
            return self.gather(values.to(self.device)).cpu()

        available = self._available(trajectories, self.objective.teachers())
        return self.objective.settle(trajectories, available, statistics, everywhere)

    def _read(self, trajectories: Trajectories, teachers: set[str]) -> Queried:
        """A micro-batch with what the student and some teachers say, without gradient."""
        trajectories, policy = trajectories.to(self.device), self.policies["student"]
        with torch.no_grad(), evaluating(policy.model):
            student = self.distribution(policy, trajectories)
        return student, {name: self.query(name, trajectories) for name in sorted(teachers)}, trajectories

    def _available(self, trajectories: Trajectories, teachers: set[str]) -> dict[str, Tensor]:
        """``[B]`` bool by teacher, for those that may be undefined for an example."""
        return {
            name: torch.tensor(
                [self.teachers[name].look(example) is not None for example in trajectories.examples],
                device=trajectories.mask.device,
            )
            for name in teachers
            if self.teachers[name].view is not None or self.teachers[name].where
        }

    def total(self, value: float) -> float:
        """Σ over ranks."""
        if self.trainer.world_size == 1:
            return value
        return float(self.trainer.strategy.reduce(torch.tensor(value, device=self.device), reduce_op="sum"))

    def gather(self, values: Tensor) -> Tensor:
        """``[N]`` of every rank, concatenated; ranks may differ in N."""
        if self.trainer.world_size == 1:
            return values
        gather: Any = self.all_gather
        longest = int(gather(torch.tensor(len(values), device=self.device)).max())
        padded = values.new_full((longest,), float("nan"))
        padded[: len(values)] = values
        everywhere: Tensor = gather(padded).flatten()
        return everywhere[~everywhere.isnan()]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.student.zero_grad()  # Lightning would keep the gradient until the next one is there
        for teacher in self.teachers.values():
            teacher.weights.update(self.global_step + 1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        missing = [name for name, p in self.student.named_parameters() if p.requires_grad and p.grad is None]
        if missing:
            raise RuntimeError(
                f"{len(missing)} trainable parameters got no gradient, among them {missing[0]}; they would not learn. "
                "Name what the loss does not reach in student.freeze. (4-bit bases lose the gradients of their "
                "adapters on some CPUs after a forward pass in eval mode.)"
            )
        self._check_finite(optimizer)

    def _check_finite(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        bad = not bool(unsharded(torch.nn.utils.get_total_norm(gradients)).isfinite())
        if self.on_nonfinite == "skip":
            self._averages.add("skipped_steps", float(bad))
        if not bad:
            return
        if self.on_nonfinite == "stop":
            raise FloatingPointError(
                f"the gradient of optimizer step {self.global_step + 1} is not finite; the last checkpoint is from "
                "before it. A lower learning rate, trainer.gradient_clip_val or float32 may help; model.on_nonfinite: "
                "skip leaves such steps out"
            )
        optimizer.zero_grad(set_to_none=True)  # an optimizer does not touch what has no gradient

    # -- logging ------------------------------------------------------------------------------------------------

    def begin_step(self) -> resume.StepStart:
        """To be called before the first micro-batch of an optimizer step."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.global_step % every == 0:
            forget_logged(self.trainer)
        return resume.StepStart(self.global_step, self._averages)

    def _logs_now(self) -> bool:
        return self.is_logged(self.global_step + 1)

    def is_logged(self, step: int) -> bool:
        """Whether what was recorded is logged after that many optimizer steps."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return step == 1 or (every > 0 and step % every == 0)

    def record(self, name: str, values: Tensor | float, counts: Tensor | float | None = None) -> None:
        """Has the mean of ``values`` since the last logged step, over ranks, logged as ``train/<name>``."""
        self._averages.add(name, values, counts)

    def recorded(self) -> dict[str, float]:
        """Means of what was recorded since the last logged step, over ranks; every rank must ask."""
        return self._averages.over_ranks(self.trainer).compute()

    def _describe(self, batch: Trajectories) -> None:
        self._averages.add("length", batch.length)
        self._averages.add("stopped", batch.stopped.float())
        self._averages.add("staleness", (self.global_step - batch.weights_version).float())

    def on_train_batch_end(self, outputs: Any, batch: MicroBatch, batch_idx: int) -> None:
        if not batch.is_last or not self.is_logged(self.global_step):
            return
        values = {f"train/{name}": value for name, value in self.recorded().items()}
        self._averages = Averages(self.device)
        shown = [name for name in values if name.startswith("train/loss/") or name == "train/reward"]
        self.log_dict({name: values.pop(name) for name in shown}, prog_bar=True)
        self.log_dict(values | self.stopwatch.read())

    # -- evaluation ---------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        mine = self._recorded if self.global_rank == 0 else {}  # they are those of all ranks
        self._averages, self._recorded = Averages.from_state_dict(mine, self.device), {}
        self._place_teachers()

    def configure_callbacks(self) -> list[L.Callback]:
        # comes first of all, and on every rank: before data are read and models loaded
        self.check()
        terms = [term for callback in self.callbacks for term in callback.terms if term not in self.objective.terms]
        if terms:  # a setting's checks are about the terms that people wrote
            self.objective = dataclasses.replace(self.objective, terms=[*self.objective.terms, *terms])
        return [EndOfRollouts()]

    def on_validation_start(self) -> None:
        self._place_teachers()

    def on_test_start(self) -> None:
        self._place_teachers()

    def on_train_start(self) -> None:
        check_limit(self.trainer)
        check_agreement(self)
        if self._rng is not None:
            _set_rng_states(self._rng)
            self._rng = None
        if self.restored:
            resume.renew(self)
            self.restored = {}
        if self.global_step == 0:
            check_self_teachers(self)
        if self.global_step == 0 and self.evaluation.before:
            self.evaluator.before_training()

    def validation_step(self, examples: list[Example], batch_idx: int) -> None:
        self.evaluate("val", "student", examples, batch_idx)

    def on_validation_epoch_end(self) -> None:
        values = self.evaluated("val")
        if not self.trainer.sanity_checking:
            shown = [name for name in ("val/accuracy", "val/length") if name in values][:1]
            # they are those of all ranks: the largest of equal ones, so that Lightning need not doubt it
            self.log_dict({name: values.pop(name) for name in shown}, prog_bar=True, sync_dist=True, reduce_fx="max")
            self.log_dict(values, sync_dist=True, reduce_fx="max")

    def test_step(self, examples: list[Example], batch_idx: int) -> None:
        self.evaluate("test", "student", examples, batch_idx)

    def on_test_epoch_end(self) -> None:
        values = self.evaluated("test")
        self.log_dict(values, sync_dist=True, reduce_fx="max")
        table = self.evaluator.table(values)
        if table is not None and self.trainer.is_global_zero:
            Console().print(table)

    @blames_rows
    def predict_step(self, examples: list[Example], batch_idx: int) -> list[dict[str, Any]]:
        return self.evaluator.predict(examples, batch_idx)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = kept_names(self)
        checkpoint["state_dict"] = {name: v for name, v in checkpoint["state_dict"].items() if name in kept}
        checkpoint["rng"] = plain_rng_states()
        # at a logged step what was recorded is logged, if it was not yet, after this
        since = Averages() if self.is_logged(self.global_step) else self._averages
        if self.loader is not None and self.loader.begun is not None and self.loader.unfinished:
            resume.rewind(checkpoint, self.loader.unfinished)
            checkpoint["rng"], since = self.loader.begun.rng, self.loader.begun.averages
        checkpoint["recorded"] = since.over_ranks(self.trainer).state_dict()
        resume.record(self, checkpoint)
        checkpoint["base"] = self._base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        resume.check(self, checkpoint)
        missing = sorted(kept_names(self) - set(checkpoint["state_dict"]))
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} of the weights that this configuration trains, among them "
                f"{missing[0]}: was it written with another model.student or model.teachers?"
            )
        check_base(self, checkpoint)
        resume.check_shapes(self, checkpoint["state_dict"])
        self._rng, self._recorded = checkpoint.get("rng"), checkpoint.get("recorded", {})

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.trainer.default_root_dir)
