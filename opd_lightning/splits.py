"""Splits: the rows of a data module, which some checks look at before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from lightning.pytorch.utilities import rank_zero_warn

from .printable import printable
from .trajectory import Example


class Splits(Protocol):
    """Interface of a LightningDataModule that offers its rows besides its dataloaders, as `PromptData` does.

    Attributes:
        train, validation, test, predict: rows by index, once it is set up; None where there are none.
        validation_batch_size: rows of a batch of `evaluation.before`.
    """

    train: Sequence[Example] | None
    validation: Sequence[Example] | None
    test: Sequence[Example] | None
    predict: Sequence[Example] | None
    validation_batch_size: int


def rows_of(trainer: Any, split: str, skipped: str) -> Sequence[Example] | None:
    """Returns the rows of a split of the trainer's data module; None where there are none, or it does not offer them.

    Args:
        trainer: of the run.
        split: one of `Splits`.
        skipped: what is not done without them, for the warning where the data module does not say.
    """
    data = getattr(trainer, "datamodule", None)
    if hasattr(data, split):
        rows: Sequence[Example] | None = getattr(data, split)
        return rows
    who = "the trainer has no data module, which" if data is None else f"{type(data).__name__}"
    rank_zero_warn(printable(f"{skipped} is skipped: {who} has no attribute {split!r} with rows (docs/rows.md)"))
    return None
