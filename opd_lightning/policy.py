"""Policies and views: models that act or are queried, and functions of the examples that they read."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

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


@dataclass(frozen=True)
class Acting:
    """Policy that acts, and what it acts on.

    Attributes:
        policy: student or teacher.
        prompts: its model inputs, as `Setting.collate` makes them.
        examples: as it reads them, through its view.
    """

    policy: Policy
    prompts: dict[str, Tensor]
    examples: list[Example]


class View(Finite, ABC):
    """View of an example: a pure function, whose value a policy reads in place of the example.

    ``columns`` names what it reads. Answering None says that there is nothing to show for this example: terms that
    ask this teacher are then off for its trajectories.
    """

    columns: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, example: Example) -> Example | None:
        """Returns the example that the policy reads; the setting collates it like any other. None: there is no view."""


class Original(View):
    """The example as the dataset has it, for a teacher of a student that has a view of its own."""

    def __call__(self, example: Example) -> Example:
        return example


def shown_by(view: View, example: Example, key: str) -> Example | None:
    """Applies a view to an example; None where it has none.

    Args:
        view: a teacher's or the student's.
        example: what it is asked about.
        key: where it is set, for the messages.

    Raises:
        ValueError: whatever the view raised; the message names the view and the columns that it reads.
        BrokenPart: it returned no example.
    """
    try:
        value = view(given(example))
    except Exception as error:
        read = f" from {', '.join(view.columns)}" if view.columns else ""
        raise ValueError(f"{reason_of(error)} (shown by {type(view).__name__}{read})") from error
    if value is not None and (not isinstance(value, dict) or ("prompt" in example and "prompt" not in value)):
        text = f"a dict without a prompt: {quoted(value)}" if isinstance(value, dict) else quoted(value)
        raise BrokenPart(
            f"{key}: {type(view).__name__} returned {text}, of type {type(value).__name__}; a view returns the example "
            "as it is shown, such as {**example, 'prompt': …}, or None where it shows nothing"
        )
    return value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches to evaluation mode within a block: no dropout, no recomputation."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def frozen_copy(model: nn.Module) -> nn.Module:
    """Copies the weights, in evaluation mode, without gradient."""
    return copy.deepcopy(model).requires_grad_(False).eval()
