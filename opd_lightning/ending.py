"""Signals that end a run: after its optimizer step, or at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
# Seconds that the step on its way has at least; queues send SIGKILL after 30 or more
PATIENCE = 10.0
# Seconds that callbacks and threads have to clean up
CLEANUP = 5.0
POLL = 0.5


class Ending:
    """Listener for SIGTERM, SIGINT and SIGHUP.

    The first one asks the run to end after the optimizer step that is on its way: `number` is then set. Another one
    ends it at once, as does the first where that step takes more than twice as long as any before it (10 seconds at
    least), because something hangs. What can't even be interrupted is ended without cleaning up.

    Args:
        forward: tells the ranks that this process started.
        waits: whether there is an optimizer step to wait for; else the first signal ends the run at once.
        left: where a run that is ended at once can go on from, in words; None: training is not what ends.
        writing: whether a thread is writing a checkpoint, for which there is no limit but that of a hang.
    """

    def __init__(
        self,
        forward: Callable[[int], None] = lambda _: None,
        waits: bool = True,
        left: Callable[[], str] | None = None,
        writing: Callable[[], bool] = lambda: False,
    ) -> None:
        self.number: int | None = None
        self._forward, self._waits, self._left, self._writing = forward, waits, left, writing
        self._over = threading.Event()
        self._longest, self._since = 0.0, time.monotonic()

    def listen(self) -> None:
        """Takes the signals over, but for those that the process was started to ignore (nohup).

        Lightning restores its own handlers and those before it when the trainer is torn down.
        """
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._receive)

    def step_done(self) -> None:
        """Measures the time of an optimizer step that is done."""
        now = time.monotonic()
        self._longest, self._since = max(self._longest, now - self._since), now

    def over(self) -> None:
        """Stops listening: the run has ended by itself."""
        self._over.set()

    @property
    def _patience(self) -> float:
        return max(PATIENCE, 2 * self._longest)

    def _receive(self, number: int, _: Any) -> None:
        first, self.number = self.number is None, number
        name = signal.Signals(number).name
        if first and self._waits:
            if number != signal.SIGINT:  # a terminal sends that to all of them
                self._forward(number)
            _say(f"{name}: ends after this optimizer step ({self._patience:.0f} s at most); once more ends at once")
            threading.Thread(target=self._insist, daemon=True).start()
            return
        _say(f"{name}: ends at once" + (f", {self._left()}" if self._left else ""))
        # for what can't be interrupted
        threading.Thread(target=self._force, daemon=True).start()
        _leave(number)

    def _insist(self) -> None:
        ended = self._over.wait(self._patience)
        while not ended and self._writing():
            ended = self._over.wait(POLL)
        if not ended:
            assert self.number is not None
            signal.pthread_kill(threading.main_thread().ident or 0, self.number)
            self._force()

    def _force(self) -> None:
        if not self._over.wait(CLEANUP):
            os._exit(128 + (self.number or 0))


def _leave(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _say(text: str) -> None:
    # a signal comes in the middle of anything, where Python's streams may be locked
    os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, f"\n{text}\n".encode())
