"""Methods: parts that one paper alone uses, a file a family; what two papers share belongs to the core."""

from . import (
    advantage,
    agreement,
    callback,
    contrast,
    cross_tokenizer,
    geometry,
    note,
    noted,
    playbook,
    rollouts,
    rubric,
    selection,
    signal,
    stepwise,
    view,
    weight,
)

__all__ = [
    "advantage",
    "agreement",
    "callback",
    "contrast",
    "cross_tokenizer",
    "geometry",
    "note",
    "noted",
    "playbook",
    "rollouts",
    "rubric",
    "selection",
    "signal",
    "stepwise",
    "view",
    "weight",
]
