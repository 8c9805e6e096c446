"""Teachers: weights × view. A teacher is inference-only: it has no gradient, no optimizer state."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .adapters import AverageAdapter, CopiedAdapter, differs_from_base, only_adapters
from .blend import BLEND
from .distribution import Distribution
from .finite import Finite
from .optimizer_step import OptimizerStep
from .policy import Policy, View, frozen_copy, shown_by
from .pretrained import Pretrained
from .ranks import Ranks
from .rows import TOO_LONG
from .sharding import reshard, slice_of
from .trajectory import Example, Trajectories


class TeacherWeights(Finite, ABC):
    """Weights of a teacher: their source and their updates."""

    stands_still: bool = False
    """Whether they are the same throughout the run: what it said once holds for as long as its view shows the same."""

    starts_as_student: bool = False
    """Whether they are the student's before the first step; it is checked then (see `compare`)."""

    top_k: int | None = None
    """How many of the likeliest actions of a state it tells besides the one taken; None: its whole distribution."""

    @property
    def base(self) -> str:
        """The policy that it is made of: ``student``, or an entry of ``model.teachers``."""
        return "student"

    @abstractmethod
    def attach(self, name: str, student: Policy, load: Callable[[Pretrained], Policy]) -> Policy:
        """Makes the policy, of the `base`; called once, before a checkpoint is restored."""

    def before_update(self, name: str, step: OptimizerStep, setting: Any, ranks: Ranks, done: int) -> Tensor | None:
        """Acts before every optimizer step, for weights that learn from the student's trajectories.

        Args:
            name: of the teacher.
            step: what the student is about to be trained on, on this rank.
            setting: of the run.
            ranks: of the run.
            done: optimizer steps that are done.

        Returns:
            A loss to log as ``train/learned/<name>``; None: nothing was learned.
        """
        return None

    def update(self, step: int) -> None:
        """Acts after every optimizer step, with the number of steps done."""

    @property
    def state(self) -> nn.Module | None:
        """State for the checkpoint besides the student; adapters live in the student already."""
        return None


class Frozen(TeacherWeights):
    """Another pretrained model, never updated and never in a checkpoint.

    Args:
        pretrained: what to load; ``quantization`` and ``dtype`` are its own.
        device: where it lives, such as ``cuda:1``; default: with the student, where its head always has a copy. (Never
            run with two devices: there were none.)
    """

    stands_still = True

    def __init__(self, pretrained: Pretrained, device: str | None = None) -> None:
        self.pretrained, self.device = pretrained, device

    def attach(self, name: str, student: Policy, load: Callable[[Pretrained], Policy]) -> Policy:
        return load(self.pretrained)


class Elsewhere(TeacherWeights):
    """Weights that are no policy of this run: they tell how likely they find the student's actions.

    They are not in this process, or of a model that reads other tokens. Such a teacher cannot act.
    """

    stands_still = True
    top_k: int | None = 0

    refusal: str = "has no model in this process"
    """Why it is no policy, for messages that begin with its name."""

    policy: Policy | None = None
    """What reads its prompts, where it is a model with a tokenizer of its own."""

    aligns: bool | None = None
    """None: it reads the student's tokens; else whether it tells distributions over its own vocabulary (`Aligned`)."""

    recorded: bool = False
    """Whether it knows of what it was asked before alone, as a file does."""

    def same(self, now: str, before: str) -> bool:
        """Tells whether two fingerprints are of the same weights."""
        return now == before

    def attach(self, name: str, student: Policy, load: Callable[[Pretrained], Policy]) -> Policy:
        raise TypeError(f"model.teachers.{name}: {type(self).__name__} {self.refusal}")

    @abstractmethod
    def connect(self, teacher: Teacher, setting: Any) -> dict[str, str]:
        """Checks that it is told of the student's actions as the student takes them, once models are loaded.

        Args:
            teacher: the entry of ``model.teachers`` whose weights they are.
            setting: of the run.

        Returns:
            What the start-up table is to say of it; in ``weights`` first their fingerprint, as `likeness.fingerprint`
            computes it where they are.

        Raises:
            ValueError: what it tells is about something else, with the reason.
        """

    @abstractmethod
    def say(self, teacher: Teacher, setting: Any, batch: Trajectories, views: list[Example | None]) -> Distribution:
        """Tells of the student's actions at all B × T states.

        Args:
            teacher: whose weights they are.
            setting: of the run.
            batch: what the student did.
            views: the example of each trajectory as the teacher is shown it. None where it is shown nothing: there the
                values are read by nobody, but have to be finite.

        Raises:
            ValueError: nothing is told of a state that is trained.
        """

    def ahead(self, teacher: Teacher, setting: Any, batch: Trajectories, views: list[Example | None]) -> None:
        """Asks about a whole generation batch as soon as it is there, for answers that take a while; as in `say`."""

    def close(self) -> None:
        """Ends connections; comes at the end of every stage, however it ends."""


class Live(TeacherWeights):
    """The student itself, as it is now, without gradient. (Diverges in SDPO and SDFT when nothing else holds it.)"""

    starts_as_student = True

    def attach(self, name: str, student: Policy, load: Callable[[Pretrained], Policy]) -> Policy:
        return student


class Same(TeacherWeights):
    """Shares the model of another teacher, without a second copy in memory: the same weights through another view.

    Args:
        teacher: the entry of ``model.teachers`` that it shares; the weights move as they move there.
    """

    def __init__(self, teacher: str) -> None:
        self.teacher = teacher

    @property
    def base(self) -> str:
        return self.teacher

    def share(self, name: str, teachers: dict[str, Teacher]) -> None:
        """Finds the teacher that it shares, as the entry ``name`` of ``teachers``.

        Raises:
            ValueError: it is not there, shares a model itself, or has none.
        """
        other = teachers.get(self.teacher)
        if other is None or isinstance(other.weights, Same | Elsewhere):
            owners = sorted(k for k, teacher in teachers.items() if not isinstance(teacher.weights, Same | Elsewhere))
            raise ValueError(f"model.teachers.{name}.weights: no {self.teacher!r} to share; there are {owners}")
        self.stands_still, self.starts_as_student = other.weights.stands_still, other.weights.starts_as_student

    def attach(self, name: str, student: Policy, load: Callable[[Pretrained], Policy]) -> Policy:
        return replace(student, cache={})  # another view makes other inputs


class Initial(TeacherWeights):
    """The student before training: with LoRA its adapter switched off, at no memory; otherwise a copy.

    Where training starts from a saved adapter, a copy of that adapter.
    """

    stands_still = True
    starts_as_student = True

    def attach(self, name: str, student: Policy, load: Callable[[Pretrained], Policy]) -> Policy:
        if isinstance(student.model, PeftModel):
            own = (CopiedAdapter(student.model, name).name,) if differs_from_base(student.model) else ()
            active = partial(only_adapters, student.model, *own)
            return Policy(student.model, student.processor, active, student.path)
        return Policy(frozen_copy(student.model), student.processor, path=student.path)


class EMA(TeacherWeights):
    """Exponential moving average, teacher ← (1−rate)·teacher + rate·student.

    With LoRA a second adapter (see `AverageAdapter`), otherwise a copy.

    A copy in 16 bits is rounded at random (see `rounded_at_random`): the nearest number would be the old one for ever.

    Args:
        rate: the student's share per update, in [0, 1]; 0 never moves, 1 is the live student.
            Default 0.01 (SDFT, 2601.19897; others use 0.01 to 0.05).
        every: optimizer steps between updates, default 1.

    Raises:
        ValueError: rate outside [0, 1], or every < 1.
    """

    starts_as_student = True

    def __init__(self, rate: float = 0.01, every: int = 1) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"EMA.rate is the student's share per update and must be in [0, 1], got {rate}")
        if every < 1:
            raise ValueError(f"EMA.every must be >= 1, got {every}")
        self.rate, self.every = rate, every
        self._average: AverageAdapter | None = None
        self._copy: nn.Module | None = None

    def attach(self, name: str, student: Policy, load: Callable[[Pretrained], Policy]) -> Policy:
        self._student = student.model
        if isinstance(student.model, PeftModel):
            self._average = AverageAdapter(student.model, name)
            active = partial(only_adapters, student.model, name)
            return Policy(student.model, student.processor, active, student.path)
        self._copy = frozen_copy(student.model)
        return Policy(self._copy, student.processor, path=student.path)

    @property
    def state(self) -> nn.Module | None:
        return self._copy

    def update(self, step: int) -> None:
        if step % self.every == 0 and self.rate:
            self._move(self.rate, step)

    def copy_student(self) -> None:
        """Makes the average the student as it is now."""
        self._move(1.0, 0)

    @torch.no_grad()
    def _move(self, rate: float, seed: int) -> None:
        """Averages the student in; ``seed`` is of the rounding, so that a resumed run draws the same."""
        if self._average is not None:
            self._average.update(rate)
        elif self._copy is not None:
            reshard(self._copy)
            device = next(self._copy.parameters()).device
            generator = torch.Generator(device).manual_seed(seed)
            for average, student in zip(self._copy.parameters(), self._student.parameters(), strict=True):
                own, other = slice_of(average), slice_of(student).to(average.device)
                if own.dtype in ROUNDED_BITS:
                    own.copy_(rounded_at_random(own.float().lerp_(other.float(), rate), own.dtype, generator))
                else:
                    own.lerp_(other.to(own.dtype), rate)


ROUNDED_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32's mantissa that a number of 16 bits has no room for."""


def rounded_at_random(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rounds float32 ``values`` to 16 bits at random, unbiased; values that fit stay."""
    bits = ROUNDED_BITS[dtype]
    noise = torch.randint(1 << bits, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    # noise carries over with the probability of the bits that are cut off; −(1 << bits) masks these
    return (values.view(torch.int32) + noise).bitwise_and_(-(1 << bits)).view(torch.float32).to(dtype)


@dataclass
class Teacher:
    """One stream of the objective: whose weights answer, seeing what.

    Args:
        weights: `Frozen`, `Initial`, `Live`, `EMA`, or `Same` as another entry's.
        view: what it is shown instead of the student's prompt; None: exactly what the student sees.
        where: only for examples whose columns have these values, such as ``{task: math}``; several teachers with
            different ``where`` and a term each route by a column.
        max_prompt_length: limit of its own prompt (with the privileged text), in steps of the setting; nothing is
            cut: an example beyond it is refused or skipped when the data is set up. None: the model's own limit.
        own_template: render prompts with the teacher's own chat template instead of the student's. A teacher of another
            tokenizer always does.
    """

    weights: TeacherWeights
    view: View | None = None
    where: dict[str, Any] = field(default_factory=dict)
    max_prompt_length: int | None = None
    own_template: bool = False

    name = ""  # its entry in model.teachers, for messages; the module sets it

    __setattr__ = Finite.__setattr__

    def look(self, example: Example, view: View | None = None) -> Example | None:
        """Shows the example to this teacher through its view, or another one; None where it has nothing to say.

        Raises:
            ValueError: as in `shown_by`.
        """
        if any(example.get(column) != value for column, value in self.where.items()):
            return None
        if self.name in example.get(TOO_LONG, ()):
            return None
        view = view or self.view
        return example if view is None else shown_by(view, example, f"model.teachers.{self.name}.view")

    def seen(self, examples: list[Example], own: list[Example], view: View | None = None) -> list[Example | None]:
        """Applies `look` to examples; without a view it reads ``own``, as the student does."""
        looks = [self.look(example, view) for example in examples]
        if (view or self.view) is not None:
            return looks
        return [None if look is None else example for look, example in zip(looks, own, strict=True)]


def enter(teachers: dict[str, Teacher]) -> None:
    """Tells teachers their names, and those that share a model whose it is.

    Raises:
        ValueError: as in `check_names` and `Same.share`.
    """
    check_names(teachers)
    for name, teacher in teachers.items():
        teacher.name = name
        if isinstance(teacher.weights, Same):
            teacher.weights.share(name, teachers)


def told(teachers: dict[str, Teacher]) -> dict[str, int]:
    """Counts the likeliest actions that teachers tell which don't tell whole distributions, by name."""
    counts = {name: teacher.weights.top_k for name, teacher in teachers.items()}
    return {name: count for name, count in counts.items() if count is not None}


def aligned(teachers: dict[str, Teacher]) -> dict[str, bool]:
    """Names the teachers of another tokenizer, and says whether they tell what `Aligned` holds."""
    elsewhere = {name: t.weights.aligns for name, t in teachers.items() if isinstance(t.weights, Elsewhere)}
    return {name: tells for name, tells in elsewhere.items() if tells is not None}


def check_names(teachers: Iterable[str]) -> None:
    """Refuses names of teachers that clash or can't be written.

    Raises:
        ValueError: a teacher is called as something else is, or so that neither log nor checkpoint can name it.
    """
    for name in teachers:
        if name in ("student", "dataset", BLEND):
            raise ValueError(f"model.teachers: {name!r} has its meaning in rollout.behavior; take another name")
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"model.teachers: a name is made of letters, digits, _ and -, not {name!r}")
        if name == "default" or hasattr(nn.ModuleDict(), name):  # of the student's adapter, and of torch
            raise ValueError(f"model.teachers: {name!r} is taken by the libraries; take another name")


def check_actors(teachers: dict[str, Teacher], sources: Set[str], whole: Set[str] = frozenset()) -> None:
    """Refuses teachers that are elsewhere, where they would have to act, to know of new rollouts, or to tell more.

    Args:
        teachers: by name.
        sources: behavior policies of the run.
        whole: those whose whole distribution a callback reads.

    Raises:
        ValueError: one is named as a behavior policy, knows of recorded completions alone while somebody acts, or tells
            log-probs of actions alone while a callback reads more.
    """
    elsewhere = {name: t.weights for name, t in teachers.items() if isinstance(t.weights, Elsewhere)}
    for name, weights in elsewhere.items():
        who = f"model.teachers.{name}: {type(weights).__name__}"
        if name in sources:
            raise ValueError(f"{who} {weights.refusal}, so it can't act; name another policy in behavior")
        if name in whole and weights.top_k is not None:
            raise ValueError(f"{who} tells log-probs of actions alone, and a callback reads its whole distribution")
        if weights.recorded and (acting := sorted(sources - {"dataset"})):
            raise ValueError(
                f"{who} knows of recorded completions alone, and {', '.join(acting)} would write new ones; set "
                "rollout.behavior: {dataset: 1.0, student: 0.0}, over the completions that were recorded"
            )
