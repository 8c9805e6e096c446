"""Calculator: a tool that runs Python programs of a policy, each in a process of its own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from .tools import Tools

WORKER = Path(__file__).with_name("calculator_worker.py")
LONGEST = 20_000  # characters of a program


class Calculator(Tools):
    """Environment with one tool, ``python(code)``: it runs a program and answers with what that prints.

    The value of the last line is printed, too. Every program has a process of its own, which begins in a few hundredths
    of a second, ends with it and leaves nothing behind: no state, no file, no other process. What isolates it:

    * limits of time, memory and output; no file can be opened, none written, no process started (rlimits);
    * on Linux (x86-64, ARM64) the kernel refuses all calls but some two dozen that computing needs (seccomp): no file,
      no socket, no process, whatever Python is made to do;
    * Python's audit hook refuses imports beyond a list (math, fractions, decimal, statistics, random, re, …), files,
      sockets and processes with a message that the policy can read; the trainer's environment is not handed on.

    What it is not: a virtual machine, a container, or another user. It runs as the trainer's user on the trainer's
    kernel, so a fault of the kernel in one of the calls that are left is not guarded against; it can read what Python
    has in its own memory, and can keep a core busy until its time is over. Without seccomp (macOS) a fault of Python is
    enough to leave, and a warning says so.

    Args:
        seconds: of a program, by the clock. Default 5.
        memory: of its process, in MiB. Default 256.
        output: characters of its answer; what is longer is cut. Default 1,000.
        tags, describe: as in `Tools`.

    Raises:
        ValueError: a limit that is not positive.
    """

    at_once = os.cpu_count() or 1  # programs that wait for a core would be late

    def __init__(
        self,
        seconds: float = 5.0,
        memory: int = 256,
        output: int = 1000,
        tags: list[str] | None = None,
        describe: bool = True,
    ) -> None:
        if not seconds > 0 or min(memory, output) < 1:
            raise ValueError(f"Calculator: seconds={seconds}, memory={memory} and output={output} must be positive")
        self.seconds, self.memory, self.output, self.tags, self.describe = seconds, memory, output, tags, describe
        self.response_template = None
        self._use([self.python])

    def python(self, code: str) -> str:
        """Runs a Python program and returns what it prints, and the value of its last line.

        Args:
            code: The program, such as "sum(range(10))". It can import math, fractions, decimal, statistics and re.
        """
        return run_program(code, self.seconds, self.memory, self.output)


def run_program(code: str, seconds: float, memory: int, output: int) -> str:
    """Runs a program in a process of its own; returns what it printed, or an error.

    Args:
        code: the program.
        seconds: by the clock.
        memory: in MiB.
        output: characters at most.
    """
    if len(code) > LONGEST:
        return f"error: the program has {len(code)} characters, {LONGEST} are read"
    # 1. a process without the trainer's environment, files or group
    command = [sys.executable, "-I", "-S", "-X", "utf8", str(WORKER), str(memory << 20), str(int(seconds) + 1)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        # 2. the program in, its answer out, within the limits
        with suppress(BrokenPipeError), process.stdin:
            process.stdin.write(code.encode(errors="replace"))
        answer, limit = _read(process.stdout.fileno(), seconds, 4 * output + 100)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
    # 3. what became of it
    isolation, _, text = answer.decode(errors="replace").partition("\n")
    if isolation == "limits":
        rank_zero_warn(
            "Calculator: this system has no seccomp, so rlimits and Python alone isolate the programs of models"
        )
    elif isolation != "seccomp":
        return f"error: {limit or f'the program ended with code {process.returncode}'}"
    text = text.removesuffix("\n")
    if len(text) > output:
        return f"{text[:output]}… [cut]"
    if limit is not None:
        return f"{text}\nerror: {limit}".lstrip()
    if process.returncode not in (0, -signal.SIGKILL):
        return f"{text}\nerror: the program crashed (signal {-process.returncode})".lstrip()
    return text or "(it printed nothing)"


def _read(file: int, seconds: float, limit: int) -> tuple[bytes, str | None]:
    """Reads up to the end, the time or the length that is allowed; returns what was read, and why it ended early."""
    answer, deadline = b"", time.monotonic() + seconds
    while len(answer) <= limit:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([file], [], [], left)[0]:
            return answer, f"no end within {seconds:g} s"
        if not (part := os.read(file, 65536)):
            return answer, None
        answer += part
    return answer, None
