"""The process in which `MathVerify` compares answers: run as a script, so that it starts without torch."""

import json
import re
import resource
import signal
import sys

import math_verify


def _serve() -> None:
    """JSON lines [answer, completion, timeout in seconds] in; a line each out: right, wrong or why neither."""
    replies, sys.stdout = sys.stdout, sys.stderr
    # A tower of powers would take all memory well within the time limit.
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        answer, completion, timeout = json.loads(line)
        # Normally the parent kills a late worker; the alarm ends one whose parent is gone.
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 1)
        print(_verdict(answer, completion), file=replies, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _verdict(answer: str, completion: str) -> str:
    # Of a bare "3\sqrt{2}" math-verify would read the 3 alone: it looks for LaTeX between dollars.
    bare = re.search(r"(?<!\\)\$|\\boxed|\\\(|\\\[|\n", answer) is None
    try:
        gold = math_verify.parse(f"${answer}$" if bare else answer, parsing_timeout=None)
        if not gold:
            return "answer not understood"
        found = math_verify.parse(completion, parsing_timeout=None)
        return "right" if math_verify.verify(gold, found, timeout_seconds=None) else "wrong"
    except Exception as error:
        return type(error).__name__


if __name__ == "__main__":
    _serve()
