"""Progress of what takes long: a line every few seconds where nothing else says that something happens."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .heart import HEART
from .printable import printable

SILENCE = 8.0
"""Seconds without a line after which a phase says how far it is."""


@dataclass(eq=False)
class Phase:
    """Phase of a run: what is done, and how far it is.

    Attributes:
        what: such as "checking rows of data.train".
        total: how many there are to do; None: nobody knows.
        done: of these.
        began: when, in seconds of `time.monotonic`.
    """

    what: str
    total: int | None = None
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def line(self, now: float) -> str:
        """Formats how far it is, for how long it goes on, and how long still."""
        seconds = now - self.began
        text = f"… {self.what}: "
        if self.total:
            text += f"{self.done:,} of {self.total:,}, "
        text += f"{clock(seconds)} so far"
        if self.total and self.done:
            text += f", about {duration(seconds / self.done * (self.total - self.done))} still"
        return text


class Narrator:
    """Says the innermost open phase of the main thread whenever nothing has been said for `SILENCE` seconds.

    Attributes:
        phases: those that are open, the outermost first.
        spoken: when something was said last.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.phases: list[Phase] = []
        self.spoken = time.monotonic()
        self._say = say or _print
        self._ended = threading.Event()

    @contextmanager
    def phase(self, what: str, total: int | None = None) -> Iterator[Phase]:
        """Opens a phase; whoever does the work counts in ``done``.

        Phases of other threads, such as rollouts ahead of training, are not said, and only rank 0 speaks.
        """
        current = Phase(what, total)
        HEART.beat()
        if threading.current_thread() is not threading.main_thread():
            yield current
            return
        self.phases.append(current)
        if len(self.phases) == 1:
            self.heard()
            self._ended = threading.Event()
            threading.Thread(target=self._watch, args=(self._ended,), daemon=True, name="progress").start()
        try:
            yield current
        finally:
            self.phases.remove(current)
            if not self.phases:
                self._ended.set()

    def heard(self) -> None:
        """Notes that a line was printed by somebody else."""
        self.spoken = time.monotonic()

    def advance(self, done: int, total: int) -> None:
        """Says of the innermost phase how far it is; costs nothing worth a word."""
        HEART.beat()
        if self.phases and threading.current_thread() is threading.main_thread():
            self.phases[-1].done, self.phases[-1].total = done, total

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(max(0.05, self.spoken + SILENCE - time.monotonic())):
            now, phases = time.monotonic(), list(self.phases)
            if phases and now - self.spoken >= SILENCE:
                self.heard()
                self._say(phases[-1].line(now))


def _print(text: str) -> None:
    """Prints a line on rank 0, as Lightning counts ranks once it is there: commands without it wait for no import."""
    lightning = sys.modules.get("lightning.pytorch.utilities")
    if lightning is None or getattr(lightning.rank_zero_only, "rank", 0) == 0:
        sys.stderr.write(printable(f"{text}\n"))
        sys.stderr.flush()


NARRATOR = Narrator()
"""That of this process."""
phase, advance = NARRATOR.phase, NARRATOR.advance


def clock(seconds: float) -> str:
    """Formats a time that goes on, so that no two lines are alike: 45 s, 12 min 05 s."""
    return duration(seconds) if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


def duration(seconds: float) -> str:
    """Formats a time for people: 45 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h" if minutes < 60 * 48 else f"{minutes / 1440:.1f} days"
