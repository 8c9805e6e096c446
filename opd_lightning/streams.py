"""Streams: distributions of the student and its teachers, by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .diagnostics import Stopwatch
from .distribution import Distribution, Stream
from .filling import fill, is_unfilled
from .likeness import check_elsewhere, fingerprint
from .loading import loading
from .optimizer_step import Cache, CachedStream, OptimizerStep
from .policy import Policy, View, evaluating
from .pretrained import Pretrained
from .progress import phase
from .ranks import Ranks
from .setting import Setting
from .sharding import FSDP2, shard
from .teacher import Elsewhere, Frozen, Teacher
from .trajectory import Example, Trajectories


@dataclass
class Streams:
    """Student and teachers by name: loads, places, queries, caches and updates them.

    Attributes:
        setting: loads models, and turns what policies say into distributions.
        teachers: as configured.
        stopwatch: measures how long teachers take.
        policies: what was loaded; teachers and ``student``.
        state: of teachers, what belongs into the checkpoint besides the student.
        base: fingerprint of the weights that training begins with, "drawn" if they were drawn.
        elsewhere: of teachers without a policy, what the start-up table says of them.
        marks: fingerprints of the weights of teachers that come from elsewhere than the student.
        keeps: whether streams of teachers whose weights stand still are kept for another epoch. Not where weights are
            cut: all ranks must ask or none, but views may have changed for the examples of some.
    """

    setting: Setting
    teachers: dict[str, Teacher]
    stopwatch: Stopwatch
    policies: dict[str, Policy] = field(default_factory=dict)
    state: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    base: str = ""
    elsewhere: dict[str, dict[str, str]] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    keeps: bool = False
    _names: set[str] = field(default_factory=set)
    _empty: bool = False

    # -- weights --------------------------------------------------------------------------------------------------

    def load(self, spec: Pretrained, empty: bool = False) -> None:
        """Loads the student, and then every teacher; ``empty``: without weights, which come when they are cut."""
        self._empty = empty
        with loading("model.student"), phase(f"loading the student, {spec.path}"):
            model = spec.load(self.setting.model_class, trained=True, empty=empty)
            student = Policy(model, self.setting.load_processor(spec), path=spec.path)
        # before teachers add adapters to it
        self._names = {name for name, _ in model.named_parameters()}
        self.base = "drawn" if spec.random_init else "" if is_unfilled(model) else fingerprint(model)
        self.policies["student"] = student
        # those that share the model of another one come after it
        for name, teacher in sorted(self.teachers.items(), key=lambda entry: entry[1].weights.base != "student"):
            if isinstance(teacher.weights, Elsewhere):
                continue
            with loading(f"model.teachers.{name}.weights.pretrained"), phase(f"loading the teacher {name}"):
                policy = teacher.weights.attach(name, self.policies[teacher.weights.base], self.load_frozen)
            self.policies[name] = replace(policy, name=name)
            if isinstance(teacher.weights, Frozen):
                self.marks[name] = "" if is_unfilled(policy.model) else fingerprint(policy.model)
            if teacher.weights.state is not None:
                self.state[name] = teacher.weights.state
        # last, since they are compared with those that are here
        for name, teacher in self.teachers.items():
            if isinstance(teacher.weights, Elsewhere):
                self.elsewhere[name] = teacher.weights.connect(teacher, self.setting)
                self.marks[name] = self.elsewhere[name]["weights"].split()[0]

    def ahead(self, names: Iterable[str], batch: Trajectories) -> None:
        """Tells teachers that are elsewhere about a whole generation batch, which they will be asked about."""
        for name in names:
            teacher = self.teachers[name]
            if isinstance(teacher.weights, Elsewhere):
                views = self.seen(name, batch.examples, batch.student_view)
                teacher.weights.ahead(teacher, self.setting, batch, views)

    @property
    def marks_here(self) -> dict[str, str]:
        """Fingerprints of the weights of teachers that were loaded here."""
        return {name: mark for name, mark in self.marks.items() if name not in self.elsewhere}

    def check_elsewhere(self, checkpoint: dict[str, Any], fits: bool) -> None:
        """Compares teachers that are elsewhere with those of a checkpoint, of a run that goes on if ``fits``."""
        weights = {name: w for name, t in self.teachers.items() if isinstance(w := t.weights, Elsewhere)}
        check_elsewhere({name: self.marks[name] for name in weights}, weights, checkpoint, fits)

    def close(self) -> None:
        """Ends connections to teachers that are elsewhere."""
        for teacher in self.teachers.values():
            if isinstance(teacher.weights, Elsewhere):
                teacher.weights.close()

    def load_frozen(self, spec: Pretrained) -> Policy:
        """Loads a model that is not trained."""
        model = spec.load(self.setting.model_class, trained=False, empty=self._empty)
        return Policy(model, self.setting.load_processor(spec), path=spec.path)

    def shard(self, mesh: Any, strategy: FSDP2) -> None:
        """Cuts the weights of all models over a mesh, but those of teachers that live on a device of their own."""
        elsewhere = {name for name, t in self.teachers.items() if isinstance(t.weights, Frozen) and t.weights.device}
        elsewhere |= {name for name, teacher in self.teachers.items() if teacher.weights.base in elsewhere}
        student = self.policies["student"].model
        # each once, in one order on all ranks: teachers in adapters share the student's model
        for model in dict.fromkeys(policy.model for name, policy in self.policies.items() if name not in elsewhere):
            # quantized teachers stay whole on every rank; `shard` refuses a quantized student
            if model is student or not getattr(model, "is_quantized", False):
                shard(model, mesh)
                if is_unfilled(model):
                    fill(model, strategy.root_device)
                strategy.allow_whole(model)
        # what could not be known before
        self.base = self.base or fingerprint(student, self._names)
        self.marks = {name: mark or fingerprint(self.policies[name].model) for name, mark in self.marks.items()}

    def place(self, device: torch.device) -> None:
        """Moves teachers, by hand: frozen ones are no submodules, to stay out of optimizer and checkpoint."""
        for name, teacher in self.teachers.items():
            if name not in self.policies:
                continue
            where = (teacher.weights.device if isinstance(teacher.weights, Frozen) else None) or device
            model = self.policies[name].model
            # `Same` shares a model that is moved for its owner; quantized weights stay where they were loaded
            if teacher.weights.base == "student" and not getattr(model, "is_quantized", False):
                model.to(where)

    @torch.no_grad()
    def learn(self, step: OptimizerStep, ranks: Ranks, done: int) -> dict[str, Tensor]:
        """Trains teachers whose weights learn from what the student did, before an optimizer step; their losses.

        Args:
            step: what the student is about to be trained on, on this rank.
            ranks: of the run.
            done: optimizer steps that are done.
        """
        weights = {name: teacher.weights for name, teacher in self.teachers.items()}
        losses = {name: w.before_update(name, step, self.setting, ranks, done) for name, w in weights.items()}
        return {name: loss for name, loss in losses.items() if loss is not None}

    def update(self, step: int) -> None:
        """Moves the weights of teachers after an optimizer step; ``step`` of them are done."""
        for teacher in self.teachers.values():
            teacher.weights.update(step)

    # -- what they say --------------------------------------------------------------------------------------------

    def student(self, batch: Trajectories) -> Distribution:
        """Evaluates the student at every state."""
        return self.setting.distribution(self.policies["student"], batch)

    def query(self, name: str, batch: Trajectories, view: View | None = None) -> Stream:
        """Evaluates a teacher at every state, without gradient; ``view``: through another view than its own."""
        teacher = self.teachers[name]
        self.stopwatch.count("teacher", int(batch.mask.sum()))
        if isinstance(teacher.weights, Elsewhere):
            with self.stopwatch.phase("teacher"):
                return self._told(name, teacher.weights, batch, view)
        policy = self.policies[name]
        # its model may be the student's, which trains on in its own mode afterwards
        with torch.no_grad(), evaluating(policy.model), self.stopwatch.phase("teacher"):
            if (view or teacher.view) is None and not teacher.where and not teacher.own_template:
                return Stream(self.setting.distribution(policy, batch))
            views = self.seen(name, batch.examples, batch.student_view, view)
            available = torch.tensor([viewed is not None for viewed in views], device=batch.mask.device)
            # where there is no view the student's own prompt keeps the shapes; the term is off there
            own = self.setting.shown(batch.examples, batch.student_view)
            seeing = [example if viewed is None else viewed for example, viewed in zip(own, views, strict=True)]
            return Stream(self.setting.distribution(policy, batch, seeing), available)

    def _told(self, name: str, weights: Elsewhere, batch: Trajectories, view: View | None) -> Stream:
        """Returns what is told of a teacher that has no policy."""
        views = self.seen(name, batch.examples, batch.student_view, view)
        available = torch.tensor([viewed is not None for viewed in views], device=batch.mask.device)
        distribution = weights.say(self.teachers[name], self.setting, batch, views).to(batch.mask.device)
        assert distribution is not None
        return Stream(distribution, None if bool(available.all()) else available)

    def query_all(
        self, names: Iterable[str], batch: Trajectories, cache: Cache | None = None, step: int = 0, again: bool = False
    ) -> dict[str, Stream]:
        """Evaluates teachers at every state.

        Args:
            names: whose streams are needed.
            batch: a micro-batch.
            cache: streams of the same micro-batch; read where they hold, added to where they will be read again.
            step: optimizer steps that are done.
            again: whether the same streams will be read again before the next optimizer step.
        """
        if cache is None:
            return {name: self.query(name, batch) for name in sorted(names)}
        return {name: self._query_once(name, batch, cache, step, again) for name in sorted(names)}

    def _query_once(self, name: str, batch: Trajectories, cache: Cache, step: int, again: bool) -> Stream:
        lasts = self.keeps and self.teachers[name].weights.stands_still
        views = self.seen(name, batch.examples, batch.student_view) if lasts else None
        # taken out: main memory holds only what will be read again
        cached = cache.pop(name, None)
        if cached is not None and (cached.step == step or (lasts and cached.views == views)):
            if lasts:
                cache[name] = cached
            stream = cached.stream.to(batch.mask.device)
            assert stream is not None
            return stream
        stream = self.query(name, batch)
        if lasts or again:
            # nothing to keep of what is evaluated only when it is opened (`Lazy`)
            kept = stream.to("cpu")
            if kept is not None:
                cache[name] = CachedStream(kept, step, views)
        return stream

    @torch.no_grad()
    def with_blind(self, streams: dict[str, Stream], batch: Trajectories) -> dict[str, Stream]:
        """Adds what teachers with a view say without it, for the log."""
        blind = dict(streams)
        for name, stream in streams.items():
            if self.teachers[name].view is not None and name in self.policies:
                with evaluating(self.policies[name].model):
                    without_view = self.setting.distribution(self.policies[name], batch)
                blind[name] = replace(stream, without_view=without_view)
        return blind

    # -- what they see --------------------------------------------------------------------------------------------

    def seen(
        self, name: str, examples: list[Example], settings: dict[str, Any] | None = None, view: View | None = None
    ) -> list[Example | None]:
        """Applies a policy's view to examples; None where a teacher is not defined.

        Args:
            name: of the policy.
            examples: rows of the data set.
            settings: of the student's view, when it acted; None: those of now.
            view: another one than the teacher's.
        """
        own = self.setting.shown(examples, settings)
        return list(own) if name == "student" else self.teachers[name].seen(examples, own, view)

    def available(self, names: Iterable[str], batch: Trajectories) -> dict[str, Tensor]:
        """Returns the availability ``[B]`` (bool) of teachers that may be undefined, without querying their models."""
        routed = [name for name in names if self.teachers[name].view is not None or self.teachers[name].where]
        looks = {name: [self.teachers[name].look(e) is not None for e in batch.examples] for name in routed}
        return {name: torch.tensor(look, device=batch.mask.device) for name, look in looks.items()}
