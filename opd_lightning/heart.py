"""Signs of progress of this process, by which a watchdog tells slow from hung."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Heart:
    """Counts signs of progress, of all threads: phases, rewards, turns, answers of servers, collectives, steps.

    Attributes:
        beats: how many there were.
        since: when the last one was, in seconds of `time.monotonic`.
        whole: whether weights, moments and positions are those between two optimizer steps, or can be taken back there.
        phase: the last phase of an optimizer step that began.
        waited: seconds in collectives, by that phase, since they were last read.
        held_up: seconds that training waited for a worker or a server, since they were last read.
    """

    def __init__(self) -> None:
        self.beats, self.since, self.whole = 0, time.monotonic(), False
        self.phase, self.waited = "start", dict[str, float]()
        self.held_up = dict[str, float]()

    def beat(self) -> None:
        """Notes progress; costs nothing worth a word."""
        self.beats += 1
        self.since = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures the time in a collective, for other ranks and for the wire."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.waited[self.phase] = self.waited.get(self.phase, 0.0) + time.monotonic() - began
            self.beat()

    @contextmanager
    def waiting_for(self, whom: str) -> Iterator[None]:
        """Measures the time for which training stands still for a ``worker`` or a ``server``; not that of threads."""
        began = time.monotonic()
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                self.held_up[whom] = self.held_up.get(whom, 0.0) + time.monotonic() - began
            self.beat()


HEART = Heart()
"""That of this process."""
