"""Policies and views: a model that acts or is queried, and what it is shown."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .finite import Finite
from .printable import quoted
from .rows import BrokenPart, given, reason_of
from .trajectory import Example


@dataclass
class Policy:
    """Something that acts or is asked: a model, and what must be switched on while it runs.

    Attributes:
        model: a transformers (or peft, or diffusers) module.
        processor: what turns examples into its inputs (tokenizer, processor); None: the student's.
        active: entered around every forward pass.
        path: where its weights came from, for messages.
        name: ``student``, or its entry in ``model.teachers``.
        cache: what its setting remembers of the inputs that it made last, for this policy alone: another thread that
            acts has another one.
    """

    model: nn.Module
    processor: Any = None
    active: Callable[[], AbstractContextManager[Any]] = nullcontext
    path: str = ""
    name: str = "student"
    cache: dict[str, Any] = field(default_factory=dict, repr=False)


class View(Finite, ABC):
    """What a policy is shown instead of the example itself: a pure function of the example.

    ``columns`` names what it reads. Answering None says that there is nothing to show for this example: terms that
    ask this teacher are then off for its trajectories.
    """

    columns: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, example: Example) -> Example | None:
        """The example as the teacher sees it; the setting collates it like any other."""


class Original(View):
    """The example as the dataset has it, for a teacher of a student that has a view of its own."""

    def __call__(self, example: Example) -> Example:
        return example


def shown_by(view: View, example: Example, key: str) -> Example | None:
    """What a view shows of an example, or None.

    Args:
        view: a teacher's or the student's.
        example: what it is asked about.
        key: where it is set, for the messages.

    Raises:
        ValueError: whatever the view raised; the message names the view and the columns that it reads.
        BrokenPart: it returned no example.
    """
    try:
        seen = view(given(example))
    except Exception as error:
        read = f" from {', '.join(view.columns)}" if view.columns else ""
        raise ValueError(f"{reason_of(error)} (shown by {type(view).__name__}{read})") from error
    if seen is not None and (not isinstance(seen, dict) or ("prompt" in example and "prompt" not in seen)):
        found = f"a dict without a prompt: {quoted(seen)}" if isinstance(seen, dict) else quoted(seen)
        raise BrokenPart(
            f"{key}: {type(view).__name__} returned {found}, of type {type(seen).__name__}; a view returns the example "
            "as it is shown, such as {**example, 'prompt': …}, or None where it shows nothing"
        )
    return seen


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within it: no dropout, no recomputation."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the weights in evaluation mode, without gradient."""
    return copy.deepcopy(model).requires_grad_(False).eval()
