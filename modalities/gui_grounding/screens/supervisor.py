"""Runs a browser's driver as long as the process that needs it lives, and ends and removes all that the driver left.

Run as a script, so that it starts without torch: ``python -P supervisor.py PARENT DRIVER ARGUMENTS…``. What a driver
starts outlives it where it is killed, and keeps files in the folder for temporary ones. Here that folder is one of its
own, and on Linux every process that loses its parent becomes a child of this one (a subreaper), so that none is lost.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

SUBREAPER = 36  # of prctl
PAUSE = 0.1


def descendants(pid: int) -> list[int]:
    """Lists the processes below a process, as far as the system tells (in /proc)."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            # behind the name, which may hold anything
            parent = int((folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    below, pids = [pid], []
    while below:
        pids += (new := children.get(below.pop(), []))
        below += new
    return pids


def end_all() -> None:
    """Kills all processes below this one, those too that are started meanwhile."""
    while pids := descendants(os.getpid()):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(PAUSE / 10)


def supervise(parent: int, command: list[str]) -> None:
    """Runs a command until it ends, this process is told to end, or the parent is gone."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    folder = tempfile.mkdtemp(prefix="opd-browser-")
    try:
        process = subprocess.Popen(command, env={**os.environ, "TMPDIR": folder}, stdin=subprocess.DEVNULL)
        while process.poll() is None and os.getppid() == parent:
            time.sleep(PAUSE)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_all()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    supervise(int(sys.argv[1]), sys.argv[2:])
