"""Looks at a run: it is built, checked and trained for a few updates, or built alone, and what was found is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .cli import OPDCLI
from .cli_errors import Parser, sentence
from .data import PromptData
from .finding import Finding
from .foresight import Foresight, forecast


class Planned(Exception):
    """Signal that a run is built, which is all that was asked for; its trainer and module."""


class PlanCLI(OPDCLI):
    """Command line that builds a run and stops before anything is loaded."""

    def before_fit(self) -> None:
        """Stops.

        Raises:
            Planned: always.
        """
        raise Planned(self.trainer, self.model)


class LookCLI(OPDCLI):
    """Command line of a run that is only looked at: bad rows are told, where the run will refuse the first."""

    def __init__(self, args: Sequence[str], foresight: Foresight) -> None:
        self._foresight = foresight
        super().__init__(args, [foresight])

    def before_fit(self) -> None:
        super().before_fit()
        self._foresight.data = self.datamodule
        if isinstance(self.datamodule, PromptData):
            self.datamodule.tell_bad_rows()


def looked(arguments: Sequence[str], folder: Path, room: float | None) -> list[Finding]:
    """Builds a run, lets `Foresight` look at it, and adds memory and what ended it.

    Args:
        arguments: of `opd fit`.
        folder: of the run, for pictures.
        room: bytes of the GPU that memory is computed for; None: the device that is there.
    """
    foresight = Foresight(folder / "check", room)
    try:
        LookCLI(arguments, foresight)
    except Exception as error:
        text = sentence(error, Parser.sources)
        if isinstance(error, torch.OutOfMemoryError):
            advice = "lower what the line on memory names"
            return [*foresight.all(), Finding("memory", "bad", f"out of memory: {error}", advice)]
        if text is None:
            raise
        what = text.removeprefix("error: ").partition("\n  (--traceback")[0]
        return [*foresight.all(), Finding("run", "bad", what, "nothing after this could be looked at")]
    return foresight.all()


def planned(arguments: Sequence[str], room: float | None) -> list[Finding]:
    """Computes memory of a run whose models are not loaded."""
    try:
        PlanCLI(["fit", *arguments, "--trainer.accelerator=auto"])
    except Planned as signal:
        trainer, module = signal.args
        return list(forecast(trainer, module, room))
    return []
