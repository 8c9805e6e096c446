"""Worker process that runs one Python program which a model wrote (see `calculator.Calculator`).

Run as a script, in a process that runs nothing else: ``python -I -S calculator_worker.py MEMORY SECONDS``. The
program comes from the standard input. What it prints, the value of its last line and its error go to the standard
output, behind a line that says what isolates it.
"""

# ruff: noqa: F401  (what is imported here is what programs may import)
import ast
import bisect
import cmath
import collections
import ctypes
import datetime
import decimal
import fractions
import functools
import heapq
import itertools
import math
import operator
import platform
import random
import re
import resource
import statistics
import string
import sys
from typing import Any

OPEN = sorted({"bisect", "cmath", "collections", "datetime", "decimal", "fractions", "functools", "heapq", "itertools"})
OPEN += ["math", "operator", "random", "re", "statistics", "string"]
"""Modules that programs may import."""

# read, write, close, fstat, lseek, mmap, mprotect, munmap, brk, rt_sigaction, rt_sigprocmask, rt_sigreturn, mremap,
# madvise, getpid, exit, exit_group, futex, sigaltstack, clock_gettime, clock_nanosleep, nanosleep, gettimeofday,
# getrandom: by the kernel's numbers; all other calls of the system fail
X86 = (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 25, 28, 35, 39, 60, 96, 131, 202, 228, 230, 231, 318)
ARM = (57, 62, 63, 64, 80, 93, 94, 98, 101, 113, 115, 132, 134, 135, 139, 169, 172, 214, 215, 216, 222, 226, 233, 278)
CALLS = {"x86_64": (0xC000003E, X86), "aarch64": (0xC00000B7, ARM)}


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("value", ctypes.c_uint)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction))]


def limit_calls() -> bool:
    """Has the kernel refuse all calls but a few (seccomp), for good; False where it can't."""
    if sys.platform != "linux" or platform.machine() not in CALLS:
        return False
    machine, allowed = CALLS[platform.machine()]
    # of another machine: killed; the call's number: in the list, or refused as not permitted
    load, equal, answer = 0x20, 0x15, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, machine), (answer, 0, 0, 0x80000000), (load, 0, 0, 0)]
    for number in allowed:
        code += [(equal, 0, 1, number), (answer, 0, 0, 0x7FFF0000)]
    code.append((answer, 0, 0, 0x00050001))
    instructions = (_Instruction * len(code))(*[_Instruction(*line) for line in code])
    program = _Program(len(code), instructions)
    libc = ctypes.CDLL(None)
    no_new_privileges, set_filter = (38, 1, 0, 0, 0), (22, 2, ctypes.byref(program), 0, 0)
    return bool(libc.prctl(*no_new_privileges) == 0 and libc.prctl(*set_filter) == 0)


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuses whatever Python announces that is no computing.

    Raises:
        ImportError: an import of a module that is not open to programs.
        PermissionError: anything else.
    """
    if event in ("compile", "exec", "object.__getattr__", "builtins.id", "sys._getframe", "code.__new__"):
        return
    if event == "import":
        raise ImportError(f"there is no module {arguments[0]!r} here; there are {', '.join(OPEN)}")
    raise PermissionError(f"{event} is not allowed here")


def run(source: str) -> None:
    """Runs a program, and prints the value of its last line, or its error."""
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        tree = ast.parse(source)
        last = tree.body[-1] if tree.body else None
        tree.body = tree.body[:-1] if isinstance(last, ast.Expr) else tree.body
        exec(compile(tree, "program", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "program", "eval"), names)
            if value is not None:
                print(value)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
    sys.stdout.flush()


def main() -> None:
    """Reads the program, gives everything up that it does not need, and runs it."""
    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    source = sys.stdin.read()
    # whatever these need later must have been used once
    decimal.Decimal(2).sqrt(), statistics.mean([1]), random.random(), datetime.datetime.now()
    limits = {"AS": memory, "CPU": seconds, "FSIZE": 0, "NOFILE": 0, "NPROC": 0, "CORE": 0}
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    print("seccomp" if limit_calls() else "limits", flush=True)
    for name in {*sys.modules} - {*OPEN, "builtins", "sys", "io", "codecs", "encodings", "encodings.utf_8", "__main__"}:
        # what libraries have imported is theirs; programs find it neither by name nor by its path
        if not name.startswith("_") and name.partition(".")[0] not in OPEN:
            del sys.modules[name]
    sys.addaudithook(refuse)
    run(source)


if __name__ == "__main__":
    main()
