"""Scoring in a process of its own: completions never reach the trainer's memory, files, network or time."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

WORKER = Path(__file__).with_name("isolated_worker.py")
START_TIMEOUT = 120.0  # importing sympy takes seconds on a busy machine
# What Python itself needs; no tokens, proxies or folders of the user
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")


class Isolated:
    """Worker process that scores; it starts when it is first needed, and again after one was late or died.

    It runs in an empty folder, without the user's environment, starts no process, opens no socket and writes no file,
    with at most 4 GiB of memory (`isolated_worker`).

    Args:
        kind: which library does the scoring.
    """

    def __init__(self, kind: Literal["math_verify", "reasoning_gym"]) -> None:
        self.kind = kind
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process, unless it runs, and waits until its libraries are imported.

        Raises:
            OSError: it does not come up.
        """
        if self.process is not None:
            return
        # 1. its folder and its environment
        folder = tempfile.mkdtemp(prefix="opd-scoring-")
        inherited = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        paths = os.pathsep.join(path for path in sys.path if os.path.isabs(path))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        # Not multiprocessing: its children import the user's script again, which need not be guarded.
        # -P keeps the modules beside the worker's file from shadowing top-level ones.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-X", "utf8", WORKER, self.kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={**inherited, **threads, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "HOME": folder},
            start_new_session=True,  # Ctrl-C must not reach it: the trainer finishes its step
        )
        # also where nobody closes it: at the end of the object, or of Python
        self._close = weakref.finalize(self, _end, self.process, folder)
        try:
            # 2. its first line: the libraries are imported
            self._exchange(None, START_TIMEOUT)
        except OSError as error:
            asked = f"{sys.executable} -P {WORKER} {self.kind}"
            raise OSError(f"the process that scores with {self.kind} does not come up; to see why: {asked}") from error

    def ask(self, arguments: list[Any], timeout: float) -> dict[str, Any]:
        """Returns ``{"value": …}``, or ``{"failure": why}``: "timeout", "worker died", or the scorer's error."""
        try:
            self.start()
            reply: dict[str, Any] = json.loads(self._exchange([arguments, timeout], timeout))
            return reply
        except TimeoutError:
            return {"failure": "timeout"}
        except OSError:
            return {"failure": "worker died"}

    def _exchange(self, question: Any, timeout: float) -> bytes:
        """Sends a line, if any, and waits for a line; a worker that failed to answer is ended."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            if question is not None:
                self.process.stdin.write(json.dumps(question).encode() + b"\n")
                self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                raise TimeoutError
            line = self.process.stdout.readline()
            if not line:
                raise BrokenPipeError
            return line
        # a late answer would be taken for that of the next question
        except BaseException:
            self._close()
            self.process = None
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {"kind": self.kind, "process": None}  # a process can be neither copied nor pickled


def _end(process: subprocess.Popen[bytes], folder: str) -> None:
    with suppress(OSError), process:
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)
