"""The file that `opd predict` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from .folder import check_folder, kept_apart
from .printable import printable


class PredictionWriter(BasePredictionWriter):
    """Writer of one JSON line per example to ``<default_root_dir>/predictions-<rank>.jsonl``, for `opd predict`.

    A file of an earlier run is kept, as ``predictions-<rank>.earlier-<n>.jsonl``.

    A line holds the ``index`` of the example in its data set (from 0, without rows that were skipped), its ``location``
    (file and row), the whole prompt, the ``answer`` where the data set has one, the completion, and its reward where
    the columns that the reward reads are there.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._path = Path(trainer.default_root_dir) / f"predictions-{trainer.global_rank}.jsonl"
        check_folder(self._path.parent)
        if trainer.is_global_zero:  # of an earlier run, which may have had more ranks
            for path in sorted(self._path.parent.glob("predictions-*.jsonl")):
                if path.stem.removeprefix("predictions-").isdecimal() and (apart := kept_apart(path)):
                    print(printable(f"what an earlier run wrote to {path} is now in {apart.name}"))
        trainer.strategy.barrier("predictions")
        self._path.write_text("", encoding="utf-8")
        self._count = 0

    def write_on_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, prediction: Any, *_: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, default=str) + "\n" for row in prediction)
        self._count += len(prediction)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        print(printable(f"wrote {self._count} predictions to {self._path}"))
