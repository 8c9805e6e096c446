"""Watchdog: a run that hangs says who waited for whom, saves the last whole step and ends."""

from __future__ import annotations

import faulthandler
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from .heart import HEART
from .note import memories
from .printable import printable
from .progress import NARRATOR, duration
from .ranks import speaking
from .stacks import doing, stacks

HUNG = 75
"""Exit code of a run that hung: that of a failure which another try may not meet (EX_TEMPFAIL)."""
REPORT = "hang.txt"
"""File in the run's folder with the stacks of all ranks."""
# Seconds that ranks have to say where they are, and to save the last whole step
ANSWER, SAVING = 10.0, 120.0
STDERR = 2  # by its number: Python's own streams may be locked
# Shares of the limit: between two looks, at most 5 s; and beyond it, after which a process ends that can't look itself
_LOOKS, _BEYOND = 8, 1.5


@dataclass
class State:
    """Place at which a rank is.

    Attributes:
        rank, process, machine: who it is.
        phases: those that are open, the outermost first.
        silent: seconds without progress.
        waits: whether it waits for other ranks.
        call: in which call.
        stacks: of all its threads.
        step: optimizer steps that are done.
        whole: whether that step can be saved.
    """

    rank: int
    phases: list[str]
    silent: float
    waits: bool
    call: str
    stacks: str
    step: int
    whole: bool
    process: int = field(default_factory=os.getpid)
    machine: str = field(default_factory=socket.gethostname)


class Board:
    """Messages between ranks whose main threads hang, by the key-value store that they met by.

    It has a server and connections of its own, so that a collective that never ends does not concern it.

    Args:
        rank, count: of this process, and how many there are.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count, self._number = rank, count, 0
        self._store: Any = None
        if count > 1:
            store: Any = torch.distributed.distributed_c10d._get_default_store()
            self._store = torch.distributed.PrefixStore("watchdog", store.clone())
            self._store.set_timeout(timedelta(seconds=SAVING))

    def tell(self, key: str, value: Any) -> None:
        """Tells something under a key of this rank."""
        if self._store is not None:
            self._store.set(f"{key}/{self.rank}", pickle.dumps(value))

    def told(self, key: str, rank: int) -> Any:
        """Returns what a rank told under a key; None: nothing yet."""
        if self._store is None or not self._store.check([f"{key}/{rank}"]):
            return None
        return pickle.loads(self._store.get(f"{key}/{rank}"))

    def exchange(self, value: Any) -> list[Any]:
        """Collects a value of every rank, each of which must ask; stands in for a collective."""
        if self._store is None:
            return [value]
        key, self._number = f"exchange-{self._number}", self._number + 1
        self.tell(key, value)
        return [pickle.loads(self._store.get(f"{key}/{rank}")) for rank in range(self.count)]


class Watchdog:
    """Thread that looks whether any rank makes progress (`Heart`), and ends the run where none does.

    Args:
        limit: seconds without progress on any rank.
        folder: of the run, for the report.
        rank, count: of this process, and how many there are.
        step: the optimizer steps that are done.
        whole: whether these can be saved now.
        save: writes the checkpoint of the last whole step, on rank 0, and returns its path; every rank calls it, and
            its collectives go through the `Board`.
        left: where a run can go on from that saved nothing, in words.
        forward: sends a signal to the ranks that this process started.
    """

    def __init__(
        self,
        limit: float,
        folder: Path,
        rank: int,
        count: int,
        step: Callable[[], int],
        whole: Callable[[], bool],
        save: Callable[[], str],
        left: Callable[[], str],
        forward: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.limit, self.folder, self.rank, self.count = limit, folder, rank, count
        self._step, self._whole, self._save, self._left, self._forward = step, whole, save, left, forward
        self._over = threading.Event()
        self._board = Board(rank, count)
        self._beats = dict.fromkeys(range(count), (-1, time.monotonic()))

    def start(self) -> None:
        HEART.beat()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def over(self) -> None:
        """Stops looking."""
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    # -- looking ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        looked = time.monotonic()
        try:
            while not self._over.wait(self._pause):
                if time.monotonic() - looked > self.limit / 2:  # all of the process stood still, and is not to blame
                    self._beats = {rank: (beats, time.monotonic()) for rank, (beats, _) in self._beats.items()}
                looked = time.monotonic()
                # a thread of C, for a process in which nobody else comes to a word: something holds Python's lock
                faulthandler.dump_traceback_later(self.limit * _BEYOND + ANSWER, exit=True, file=STDERR)
                if self._hangs():
                    self._end()
        except (OSError, RuntimeError):  # another rank has ended, and with it what it served
            return

    @property
    def _pause(self) -> float:
        """Seconds between two looks, more where many ranks ask the one store."""
        return min(5.0 * max(1.0, self.count / 16), self.limit / _LOOKS)

    def _hangs(self) -> bool:
        """Tells whether no rank has made progress for the limit, or another rank says so."""
        self._board.tell("beats", HEART.beats)
        now, hung = time.monotonic(), False
        for rank, (before, _) in self._beats.items():
            beats = HEART.beats if rank == self.rank else self._board.told("beats", rank)
            hung |= rank != self.rank and bool(self._board.told("hung", rank))
            if beats is not None and beats != before:
                self._beats[rank] = (beats, now)
        return hung or all(now - since > self.limit for _, since in self._beats.values())

    # -- ending ----------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Reports, saves and ends the process, whatever its main thread does."""
        faulthandler.dump_traceback_later(SAVING + 3 * ANSWER, exit=True, file=STDERR)
        try:
            self._board.tell("hung", True)
            states = self._states()
            speaks = min(states) == self.rank
            if speaks:
                self._say(report(states, self.count, self.limit))
            saved = self._saved(states)
            if speaks:
                self._say(f"the last whole step is in {saved}; go on with --ckpt_path=last" if saved else self._left())
                self._board.tell("done", True)
            else:
                end = time.monotonic() + SAVING
                while not self._board.told("done", min(states)) and time.monotonic() < end:
                    time.sleep(0.01)
            # all end together, when all have read that: a main thread that finds a closed connection has another code
            time.sleep(1.0)
            self._forward(9)
        finally:
            os._exit(HUNG)

    def _states(self) -> dict[int, State]:
        """Collects where the ranks are, of all that answer."""
        waits, call = doing(self.count > 1)
        phases = [phase.what for phase in list(NARRATOR.phases)]
        silent = time.monotonic() - HEART.since
        own = State(self.rank, phases, silent, waits, call, stacks(), self._step(), self._whole())
        self._board.tell("state", own)
        states, end = {self.rank: own}, time.monotonic() + ANSWER + self._pause
        while len(states) < self.count and time.monotonic() < end:
            time.sleep(0.1)
            for rank in set(range(self.count)) - states.keys():
                if (state := self._board.told("state", rank)) is not None:
                    states[rank] = state
        return states

    def _saved(self, states: dict[int, State]) -> str:
        """Returns the path of the last whole step's checkpoint; empty where it can't be saved."""
        if len(states) < self.count or not all(state.whole for state in states.values()):
            return ""
        if len({state.step for state in states.values()}) > 1 or not states[self.rank].step:
            return ""
        try:
            with speaking(self._board.exchange):
                return self._save()
        except Exception as error:  # the report matters more
            self._say(f"the last whole step could not be saved: {type(error).__name__}: {error}")
            return ""

    def _say(self, text: str) -> None:
        text = printable(f"{text}\n")
        try:
            with (self.folder / REPORT).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            pass
        os.write(STDERR, f"\n{text}".encode())


def can_go_back(trainer: Any) -> bool:
    """Tells whether nothing that a checkpoint holds is in the making: rollouts ahead, and memories of notes."""
    return trainer.train_dataloader.can_go_back and not any(memories(trainer.lightning_module.notes).values())


def report(states: dict[int, State], count: int, limit: float) -> str:
    """Formats who waited for whom, and the stacks of all ranks."""
    lines = [f"No progress for {duration(limit)} (checkpoint.hang_limit), {time.strftime('%Y-%m-%d %H:%M:%S')}:"]
    for rank in range(count):
        state = states.get(rank)
        if state is None:
            lines.append(f"  rank {rank}: does not answer; it is dead, or something in it holds Python's lock")
            continue
        where = f" during {' > '.join(state.phases)}" if state.phases else ""
        does = "waits for other ranks in" if state.waits else "is in"
        since = f"for {duration(state.silent)}, after step {state.step}"
        lines.append(f"  rank {rank}: {does} {state.call}{where}, {since}")
    waiting = [str(rank) for rank, state in sorted(states.items()) if state.waits]
    others = [str(rank) for rank in range(count) if rank not in states or not states[rank].waits]
    if waiting and others:
        lines.append(f"Waiting: rank {', '.join(waiting)}. For: rank {', '.join(others)}.")
    for rank, state in sorted(states.items()):
        lines += ["", f"rank {rank}, process {state.process} on {state.machine}:", state.stacks]
    return "\n".join(lines)
