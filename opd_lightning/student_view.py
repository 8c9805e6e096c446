"""What the student is shown, and what it was shown when it acted: rollouts that wait for their training are trained as
they were sampled, although a callback may have turned the view since, or a checkpoint lies between."""

from __future__ import annotations

import inspect
from typing import Any

from .policy import View, shown_by
from .trajectory import Example


def shown(view: View | None, examples: list[Example], settings: dict[str, Any] | None = None) -> list[Example]:
    """Applies the student's view to examples; those without a view stay as they are.

    Args:
        view: the student's, as it is now.
        examples: rows of the data set.
        settings: of `settings_of`: as the view was then.

    Raises:
        ValueError: then it was another view.
    """
    if settings is not None:
        view = as_it_was(view, settings)
    return (
        examples if view is None else [shown_by(view, example, "model.student_view") or example for example in examples]
    )


def settings_of(view: View | None) -> dict[str, Any]:
    """Collects the settings of a view for a checkpoint: its class and its constructor's arguments.

    Those that it keeps under their own names, which callbacks can turn, and those of the views that it holds. Empty
    where there is no view."""
    if view is None:
        return {}
    kept = {name: _plain(getattr(view, name)) for name in _arguments(view) if hasattr(view, name)}
    return {"class": type(view).__name__, **{name: value for name, (value, known) in kept.items() if known}}


def as_it_was(view: View | None, settings: dict[str, Any]) -> View | None:
    """Copies a view with these settings, independent of the original.

    Raises:
        ValueError: the settings are another view's.
    """
    if not settings:
        return None
    if view is None or settings["class"] != type(view).__name__:
        raise ValueError(
            f"the rollouts that are still to be trained were sampled with model.student_view: {settings['class']}, "
            f"which is now {'none' if view is None else type(view).__name__}; go on with the view that they were "
            "shown, and change it in a new run"
        )
    names = _arguments(view)
    if not all(hasattr(view, name) for name in names):
        return view  # nobody can turn it
    now = {name: getattr(view, name) for name in names}
    then = {name: _restored(value, settings[name]) for name, value in now.items() if name in settings}
    return type(view)(**(now | then))


def _arguments(view: View) -> list[str]:
    return list(inspect.signature(type(view)).parameters)


def _plain(value: Any) -> tuple[Any, bool]:
    """Converts a value for a checkpoint; also returns whether that is possible."""
    if isinstance(value, View):
        return settings_of(value), True
    if isinstance(value, list | tuple):
        parts = [_plain(part) for part in value]
        return [part for part, _ in parts], all(known for _, known in parts)
    return value, isinstance(value, bool | int | float | str | None)


def _restored(value: Any, then: Any) -> Any:
    """Restores an argument."""
    if isinstance(value, View):
        return as_it_was(value, then)
    if isinstance(value, list | tuple):
        return [_restored(one, other) for one, other in zip(value, then, strict=True)]
    return then
