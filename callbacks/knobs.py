"""Public knobs of a module, by dotted paths such as `rollout.horizon` or `objective.terms.0.coefficient`."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any

import lightning as L

from ..module import OnPolicyDistillation


def owner(module: OnPolicyDistillation, path: str) -> tuple[Any, str]:
    """The object that holds a knob, and the knob's name in it; numbers index lists, names attributes or keys.

    Raises:
        ValueError: there is no such knob; the message names the part of the path that is not there, and what is.
    """
    *parts, last = path.split(".")
    found: Any = module
    for i, part in enumerate([*parts, last]):
        if not _has(found, part):
            where = ".".join(path.split(".")[:i]) or "the module"
            raise ValueError(f"no knob {path!r}: {where} has no {part!r}; it has {', '.join(_offered(found))}")
        if i < len(parts):
            found = _get(found, part)
    return found, last


def read(module: OnPolicyDistillation, path: str) -> Any:
    """
    Raises:
        ValueError: there is no such knob.
    """
    return _get(*owner(module, path))


def turn(module: OnPolicyDistillation, path: str, value: Any) -> None:
    """Sets a knob; a whole number stays one, rounded.

    Raises:
        ValueError: there is no such knob, or its owner refuses the value (it is then as it was).
    """
    holder, name = owner(module, path)
    before = _get(holder, name)
    if isinstance(before, int) and not isinstance(before, bool) and isinstance(value, float):
        value = round(value)
    _set(holder, name, value)
    if dataclasses.is_dataclass(holder) and not isinstance(holder, type):
        try:
            dataclasses.replace(holder)  # its own checks
        except ValueError as error:
            _set(holder, name, before)
            raise ValueError(f"{path} can't be {value!r}: {error}") from error


class KnobCallback(L.Callback):
    """A callback that turns knobs. Two that turn the same one are refused before training."""

    @property
    @abstractmethod
    def knobs(self) -> tuple[str, ...]:
        """Paths of what it turns."""

    @property
    def state_key(self) -> str:
        return self._generate_state_key(knobs=self.knobs)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """
        Raises:
            ValueError: a knob that isn't there, or that another callback turns too.
        """
        assert isinstance(pl_module, OnPolicyDistillation)
        for knob in self.knobs:
            read(pl_module, knob)
        everyone = [callback for callback in trainer.callbacks if isinstance(callback, KnobCallback)]  # type: ignore[attr-defined]
        for other in everyone:
            if other is not self and (shared := set(self.knobs) & set(other.knobs)):
                raise ValueError(
                    f"trainer.callbacks: {type(self).__name__} and {type(other).__name__} both turn "
                    f"{', '.join(sorted(shared))}; keep one of them"
                )


def _has(holder: Any, name: str) -> bool:
    if isinstance(holder, dict):
        return name in holder
    if isinstance(holder, list):
        return name.isdigit() and int(name) < len(holder)
    return hasattr(holder, name)


def _get(holder: Any, name: str) -> Any:
    if isinstance(holder, dict):
        return holder[name]
    return holder[int(name)] if isinstance(holder, list) else getattr(holder, name)


def _set(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    elif isinstance(holder, list):
        holder[int(name)] = value
    else:
        setattr(holder, name, value)


def _offered(holder: Any) -> list[str]:
    if isinstance(holder, dict):
        return sorted(map(str, holder))
    if isinstance(holder, list):
        return [str(i) for i in range(len(holder))]
    if isinstance(holder, OnPolicyDistillation):
        return ["rollout", "objective", "teachers", "evaluation"]
    return sorted(name for name in vars(holder) if not name.startswith("_"))
