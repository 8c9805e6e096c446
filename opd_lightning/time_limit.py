"""A time limit for calls of users' functions."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from .heart import HEART


class TooLate(BaseException):
    """Signal that the time is over; no `Exception`, so that a reward's own handlers let it pass."""


def within(seconds: float | None, call: Callable[[], Any]) -> Any:
    """Returns a call's result; interrupts it after so many seconds.

    Without alarms, which Windows and other threads than the main one lack, it is not interrupted.

    Raises:
        TooLate: it was ended, or came to an end later.
    """
    HEART.beat()
    if seconds is None or not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        return call()
    running, late, start = True, False, time.monotonic()

    def over(*_: Any) -> None:
        nonlocal late
        late = True
        # it may come when the call has just returned
        if running:
            raise TooLate

    handler = signal.signal(signal.SIGALRM, over)
    alarm, every = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again each second: one may be swallowed
    try:
        result = call()
    finally:
        running = False
        # an alarm that was set before goes on with what is left of it
        left = max(alarm - (time.monotonic() - start), 1e-3) if alarm else 0.0
        signal.setitimer(signal.ITIMER_REAL, left, every)
        signal.signal(signal.SIGALRM, handler)
    if late:
        raise TooLate
    return result
