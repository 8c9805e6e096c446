"""Knobs: public settings of a run that callbacks turn while it trains.

A knob is an argument of a part's constructor that the part keeps under the same name. It is named by its path below the
module: ``rollout.horizon``, ``objective.terms.0.signal.beta``, ``teachers.teacher.weights.rate``. Entries of lists go
by their place or by their own name (``objective.terms.ReverseKL.coefficient``), entries of mappings by their key.
``rollout.behavior.teacher`` is one policy's share of the rollouts; the others give way in the proportions that were
configured (equally, where they had none).
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import abstractmethod
from typing import Any, get_args, get_type_hints

import lightning as L
from torch import nn

from ..callback import DistillationCallback
from ..module import OnPolicyDistillation
from ..optimization import LRSchedule
from ..optimizer_step import OptimizerStep
from ..pretrained import Lora, Pretrained
from ..rollout_settings import Rollout
from ..teacher import Frozen, Same, Teacher

# What is read once, when models are loaded, data is checked or batches are cut; turning it later would change nothing.
READ_ONCE: dict[type, set[str] | None] = {
    Rollout: {
        "batch_size",
        "group_size",
        "members",
        "micro_batch_size",
        "epochs",
        "max_prompt_length",
        "max_staleness",
    },
    Teacher: {"max_prompt_length"},
    **dict.fromkeys((LRSchedule, Pretrained, Lora, Frozen, Same)),
}


class Knob:
    """One knob of a module.

    Attributes:
        path: its name.
        owner: the part whose constructor takes it.
        argument: the constructor's name for it.
        entry: a key, where the argument is a mapping and the knob one entry of it.

    Raises:
        ValueError: there is no such knob, or turning it would change nothing; the message says what there is.
    """

    def __init__(self, module: OnPolicyDistillation, path: str) -> None:
        self.path = path
        self.owner: Any = module
        self.argument, self.entry = "", None
        value, walked = module, "the module"
        for part in path.split("."):
            inside = _inside(value)
            if part not in inside:
                raise ValueError(f"no knob {path!r}: {walked} has no {part!r}; it has {', '.join(inside)}")
            if isinstance(value, dict):
                self.entry = part
            elif not isinstance(value, list):
                self.owner, self.argument, self.entry = value, part, None
            value, walked = inside[part], part if walked == "the module" else f"{walked}.{part}"
        self._configured = dict(self._kept) if isinstance(self._kept, dict) else None
        self._check_turnable(value)

    def _check_turnable(self, value: Any) -> None:
        owner, name = self.owner, type(self.owner).__name__
        if isinstance(value, list | nn.Module) or hasattr(value, "__dict__") or isinstance(owner, nn.Module):
            offered = ", ".join(_inside(value)) or "nothing"
            raise ValueError(f"{self.path} is no knob, but a part of the run, which has {offered}")
        once = [names for kind, names in READ_ONCE.items() if isinstance(owner, kind)]
        if any(names is None or self.argument in names for names in once):
            raise ValueError(f"{self.path} is read once, when the run begins: turning it would change nothing")
        if getattr(getattr(owner, "__dataclass_params__", None), "frozen", False):
            raise ValueError(f"{self.path}: a {name} is shared and can't be changed")
        missing = [argument for argument in _arguments(owner) if not hasattr(owner, argument)]
        if missing or self.argument not in _arguments(owner):
            raise ValueError(
                f"{self.path}: {name} does not keep its arguments under their own names "
                f"({', '.join(missing or [self.argument])}), so a new value could not be checked"
            )

    @property
    def _kept(self) -> Any:
        return getattr(self.owner, self.argument)

    @property
    def value(self) -> Any:
        return self._kept if self.entry is None else self._kept[self.entry]

    @property
    def _is_share(self) -> bool:
        return isinstance(self.owner, Rollout) and self.argument == "behavior"

    def overlaps(self, other: Knob) -> bool:
        """Tells whether turning one turns the other, under any name."""
        if self.owner is not other.owner or self.argument != other.argument:
            return False
        return self._is_share or self.entry == other.entry or None in (self.entry, other.entry)

    def turn(self, value: Any) -> None:
        """Sets it; where the constructor takes whole numbers only, to the nearest one.

        Raises:
            ValueError: the part's constructor refuses the value; nothing is changed then.
        """
        kept = self._as_argument(value)
        try:
            now, then = self._twin(self._kept), self._twin(kept)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path} can't be {value!r}: {error}") from error
        for name, checked in vars(then).items():
            # also what the constructor derives from the value, but nothing that the part has become since
            if checked is not vars(now).get(name):
                setattr(self.owner, name, checked)

    def _as_argument(self, value: Any) -> Any:
        if isinstance(value, float) and self._is_whole:
            value = round(value)
        if self.entry is None:
            return value
        if not self._is_share:
            return {**self._kept, self.entry: value}
        assert self._configured is not None
        others = {name: share for name, share in self._configured.items() if name != self.entry}
        total = sum(others.values())
        return {
            name: (1 - value) * (share / total if total else 1 / len(others)) if name in others else value
            for name, share in self._configured.items()
        }

    @property
    def _is_whole(self) -> bool:
        described = type(self.owner) if dataclasses.is_dataclass(self.owner) else type(self.owner).__init__
        hint = get_type_hints(described)[self.argument]
        kinds = get_args(hint) or (hint,)
        return int in kinds and float not in kinds

    def _twin(self, value: Any) -> Any:
        """Builds another owner with another value, by whose constructor it is checked."""
        arguments = {name: getattr(self.owner, name) for name in _arguments(self.owner)}
        return type(self.owner)(**{**arguments, self.argument: value})


class KnobCallback(DistillationCallback):
    """A callback that turns knobs. Two that turn the same one are refused before training.

    What a knob was when an optimizer step began is logged as ``knob/<path>``. A subclass names its knobs and turns them
    in `advance`; what it remembers goes into ``state_dict``, and `advance` must turn the knobs of a resumed run to
    where they were.
    """

    @property
    @abstractmethod
    def knobs(self) -> tuple[str, ...]:
        """Paths of what it turns."""

    @property
    def state_key(self) -> str:
        return self._generate_state_key(knobs=self.knobs)

    def advance(self, module: OnPolicyDistillation) -> None:
        """Turns the knobs: before the first rollout, and after each of ``module.global_step`` optimizer steps."""

    def check(self, module: OnPolicyDistillation) -> None:
        """Finds its knobs, which can be read and turned from then on.

        Raises:
            ValueError: a knob that isn't there, or that another callback turns, too.
        """
        self._held = {path: Knob(module, path) for path in self.knobs}
        for other in [callback for callback in module.trainer.callbacks if isinstance(callback, KnobCallback)]:  # type: ignore[attr-defined]
            for path in other.knobs:
                for knob in self._held.values():
                    if (other is not self or path != knob.path) and knob.overlaps(Knob(module, path)):
                        raise ValueError(
                            f"trainer.callbacks: {type(self).__name__} ({knob.path}) and {type(other).__name__} "
                            f"({path}) turn the same knob; keep one of them"
                        )

    def read(self, path: str) -> Any:
        """Returns the present value of one of its knobs."""
        return self._held[path].value

    def turn(self, path: str, value: Any) -> None:
        """Turns one of its knobs (`Knob.turn`)."""
        self._held[path].turn(value)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.advance(pl_module)  # type: ignore[arg-type]

    def on_optimizer_step_end(self, module: OnPolicyDistillation, step: OptimizerStep) -> None:
        for path, knob in self._held.items():
            for name, value in _numbers(path, knob.value).items():
                module.log(f"knob/{name}", value)
        self.advance(module)


def _arguments(owner: Any) -> list[str]:
    fixed = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, p in inspect.signature(type(owner)).parameters.items() if p.kind in fixed]


def _inside(part: Any) -> dict[str, Any]:
    """Lists the names with which a path may continue."""
    if isinstance(part, dict):
        return {str(key): value for key, value in part.items()}
    if isinstance(part, list):
        named = {item.name: item for item in part if isinstance(getattr(item, "name", None), str)}
        return {**{str(place): item for place, item in enumerate(part)}, **named}
    if isinstance(part, OnPolicyDistillation):
        names = ("rollout", "objective", "teachers", "evaluation", "reward", "student_view")
        return {name: getattr(part, name) for name in names if getattr(part, name) is not None}
    return {name: value for name, value in getattr(part, "__dict__", {}).items() if not name.startswith("_")}


def _numbers(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, dict):
        return {path: number for key, part in value.items() for path, number in _numbers(f"{name}.{key}", part).items()}
    return {name: float(value)} if isinstance(value, int | float) else {}
