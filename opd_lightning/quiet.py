"""What libraries print that concerns nobody: advertisements, bars of a second, and doubts about what is meant so."""

from __future__ import annotations

import logging
import warnings

import datasets
from transformers.utils import logging as transformers_logging

ADVERTISED = (
    "💡 Tip",
    "GPU available: ",
    "TPU available: ",
    "HPU available: ",
    "`Trainer.fit` stopped",
    "`Trainer(val_check_interval=1)` was configured",
)
"""Beginnings of Lightning's lines that are not printed."""
DOUBTED = (
    ".*LeafSpec.*",  # its own use of a deprecated helper of torch
    "LightningCLI's args parameter.*",  # they do come from the command line
    "Checkpoint directory .* exists and is not empty.*",  # files are resumed from or moved, and a message says so
    "The number of training batches .* is smaller than the logging interval.*",  # steps count here, not epochs
    "The '.*_dataloader' does not have many workers.*",  # rows are in memory
    ".*gradient_checkpointing.* is deprecated.*",  # transformers' own names
)
"""Warnings of libraries that are not shown."""


def hush() -> None:
    """Takes off what libraries print that says nothing of a run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(says_something)
    for message in DOUBTED:
        warnings.filterwarnings("ignore", message=message)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


def says_something(record: logging.LogRecord) -> bool:
    """Tells whether a line of Lightning is about the run."""
    return not record.getMessage().startswith(ADVERTISED)
