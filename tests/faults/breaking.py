"""Parts that break, for configurations of real processes."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch

from opd_lightning import Environment, Turn
from opd_lightning.connection import Connection
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


CALLS = {"reward": 0, "environment": 0, "view": 0}


def hang_once(what: str) -> None:
    """Hangs at the ``$HANGS_AT``-th call, on the rank ``$HANGS_ON``; without these never."""
    CALLS[what] += 1
    here = os.environ.get("LOCAL_RANK", "0") == os.environ.get("HANGS_ON", "0")
    if here and CALLS[what] == int(os.environ.get("HANGS_AT", "0")):
        time.sleep(10**6)


def stalls(completion: str, example: dict[str, Any]) -> float:
    """A reward that hangs once."""
    hang_once("reward")
    return float(len(completion) % 3)


def locks(completion: str, example: dict[str, Any]) -> float:
    """A reward that hangs in C, and holds Python's lock."""
    CALLS["reward"] += 1
    if CALLS["reward"] == int(os.environ.get("HANGS_AT", "0")):
        ctypes.PyDLL(None).sleep(10**6)
    return float(len(completion) % 3)


def asks(completion: str, example: dict[str, Any]) -> float:
    """A reward by a server, ``$SERVER``."""
    return float(Connection(os.environ["SERVER"], "", 10**6, 10**6).ask_json("/", {"length": len(completion)}))


class Stalls(Environment):
    """Hangs once, in a turn."""

    rewards = True

    def step(self, state: Any, text: str) -> Turn:
        hang_once("environment")
        turn = (state or 0) + 1
        return Turn(f"+{len(text)}=", turn, turn > 1, float(turn))


class StallsAhead(View):
    """Hangs once, in the thread that rolls out ahead."""

    def __call__(self, example):
        if threading.current_thread().name.startswith("rollout"):
            hang_once("view")
        return example
