"""Stacks of all threads of this process, and what its main thread waits for."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

_COLLECTIVES = (os.path.join("torch", "distributed", ""), os.path.join("torch", "nn", "parallel", "distributed.py"))
_BACKWARD = {"run_backward", "_engine_run_backward"}
_LIBRARIES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}lib{os.sep}python")


def stacks() -> str:
    """Formats the stack of each thread, the main one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda entry: entry[0] != main)
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame)).rstrip()}"
        for ident, frame in frames
        if ident != threading.get_ident()
    )


def doing(many: bool) -> tuple[bool, str]:
    """Tells what the main thread is in.

    Args:
        many: whether there are other ranks, for which a backward pass waits.

    Returns:
        whether it waits for other ranks, and in which call of its own code, by function, file and line.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    calls: list[FrameType] = []
    while frame is not None:
        calls.append(frame)
        frame = frame.f_back
    if not calls:
        return False, "nothing: its main thread has ended"
    # innermost first: what comes before its own code is what that is in
    own = next((call for call in calls if not _is_in(call, _LIBRARIES)), calls[-1])
    here = f"{own.f_code.co_name}, {Path(own.f_code.co_filename).name}:{own.f_lineno}"
    inside = calls[: calls.index(own)]
    names = [call.f_code.co_name for call in inside if _is_in(call, _COLLECTIVES)]
    if many and not names and any(call.f_code.co_name in _BACKWARD for call in inside):
        names = ["the backward pass, which averages gradients"]
    return bool(names), f"{names[0]} (called by {here})" if names else here


def _is_in(call: FrameType, places: tuple[str, ...]) -> bool:
    return any(place in call.f_code.co_filename for place in places)
