"""Parts that break, for configurations of real processes."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import torch

from opd_lightning.objective import ReverseKL
from opd_lightning.policy import View


class Breaks(ReverseKL):
    """NaN at one of its calls."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def __call__(self, steps):
        self.calls += 1
        return super().__call__(steps) * (torch.nan if self.calls == self.at else 1.0)


class Greedy(Breaks):
    """Wants more memory than there is at one of its calls."""

    def __call__(self, steps):
        if self.calls + 1 == self.at:
            torch.empty(2**52)
        return super().__call__(steps)


class FailsAhead(View):
    """Raises in the thread that rolls out ahead, at the tenth example."""

    calls = 0  # of all copies: the thread has one of its own

    def __call__(self, example):
        FailsAhead.calls += threading.current_thread().name.startswith("rollout")
        if FailsAhead.calls == 10:
            raise RuntimeError("the tenth example fails")
        return example


def sleeps(completion: str, example: dict[str, Any]) -> float:
    """A reward that hangs, and says that it does in the file ``$HANGING``."""
    Path(os.environ["HANGING"]).touch()
    time.sleep(10**6)
    return 0.0


def never_lets_go(completion: str, example: dict[str, Any]) -> float:
    """A reward that can't even be interrupted."""
    while True:
        try:
            sleeps(completion, example)
        except BaseException:
            continue
