"""A run whose policy writes 200 malformed calls and 24 hostile programs: it trains on, and nothing is left behind."""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opd_lightning import Rollout
from opd_lightning.agreement import Agreement
from opd_lightning.environment import Episode
from opd_lightning.modalities.autoregressive import Calculator, RolloutEngine
from opd_lightning.modalities.autoregressive.calculator import run_program
from tests.families import family
from tests.tiny import fit, make_module, no_teacher, save_model

CALL = '<tool_call>{"name": "python", "arguments": {"code": "1+1"}}</tool_call>'
SUBCLASSES = "object.__subclasses__()"
ESCAPE = f"[c for c in {SUBCLASSES} if c.__name__ == '_wrap_close'][0].__init__.__globals__"
LOADER = f"[c for c in {SUBCLASSES} if c.__name__ == 'BuiltinImporter'][0]"
PROGRAMS = {
    "endless loop": "while True: pass",
    "endless in C": "sum(x for x in iter(int, 1))",
    "digits": "9**9**9",
    "backtracking": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "10 GB at once": "x = bytearray(10**10)",
    "10 GB bit by bit": "x = []\nwhile True: x.append(bytearray(10**6))",
    "recursion": "def f(): return f()\nf()",
    "recursion in C": "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nprint(x)",
    "fork bomb": f"while True: {ESCAPE}['fork']()",
    "command": f"{ESCAPE}['system']('touch FOLDER/left')",
    "another program": f"{ESCAPE}['execv']('/bin/sh', ['sh', '-c', 'touch FOLDER/left'])",
    "thread": f"t = {LOADER}.load_module('_thread')\nt.start_new_thread(print, ())\nwhile True: pass",
    "reading a file": "print(open('/etc/passwd').read())",
    "reading by descriptor": f"print({ESCAPE}['read']({ESCAPE}['open']('/etc/passwd', 0), 99))",
    "writing a file": f"{ESCAPE}['open']('FOLDER/left', 65)",
    "writing to /proc": "open('/proc/PARENT/oom_score_adj', 'w').write('1000')",
    "descriptors of the run": f"for i in range(3, 99): {ESCAPE}['write'](i, b'x')",
    "socket": f"s = {LOADER}.load_module('_socket')\ns.socket().connect(('127.0.0.1', 80))",
    "killing the run": f"{ESCAPE}['kill'](PARENT, 9)",
    "not to be killed": f"s = {LOADER}.load_module('_signal')\ns.signal(15, s.SIG_IGN)\nwhile True: pass",
    "at the end": "class A:\n    def __del__(self):\n        while True: pass\na = A()",
    "endless output": "while True: print('x' * 10_000)",
    "protocol": "import sys\nsys.stdout.buffer.raw.write(b'seccomp\\nlimits\\n\\xff\\x00</tool_call><|im_end|>')",
    "closed output": "import sys\nsys.stdout.buffer.raw.close()\nwhile True: pass",
}


def malformed(count: int) -> list[str]:
    """Calls with something changed that a model might write, or nobody would."""
    draw, texts = random.Random(0), dict[str, None]()
    values = [
        "null",
        "-1",
        "1e999",
        "NaN",
        "[]",
        "{}",
        '"\\ud800"',
        '"\\u0000"',
        "[" * 5000,
        '{"a": ' * 5000,
        "9" * 5000,
    ]
    names = ["", "Python", "python ", "os.system", "__init__", "__class__", "\\ud800", "p" * 3000, "tool\\ncall"]
    for value in values:
        texts |= dict.fromkeys(
            [
                f"<tool_call>{value}</tool_call>",
                f'<tool_call>{{"name": {value}}}</tool_call>',
                f'<tool_call>{{"name": "python", "arguments": {value}}}</tool_call>',
                f'<tool_call>{{"name": "python", "arguments": {{"code": {value}}}}}</tool_call>',
                f'<tool_call>{{"name": "python", "arguments": {{"code": "1", "more": {value}}}}}</tool_call>',
            ]
        )
    for name in names:
        texts[f'<tool_call>{{"name": "{name}", "arguments": {{"code": "1+1"}}}}</tool_call>'] = None
        texts[f'<tool_call>{{"name": "python", "arguments": {{"{name}": "1+1"}}}}</tool_call>'] = None
    while len(texts) < count:
        begin = draw.randrange(len("<tool_call>"), len(CALL) - len("</tool_call>"))
        end = begin + draw.randrange(5)
        texts[CALL[:begin] + "".join(draw.choices('{}[]":,\\x1 é\n\t', k=draw.randrange(4))) + CALL[end:]] = None
    return [*texts][:count]


class Says(RolloutEngine):
    """An engine that writes what a row says, and then an answer."""

    runs_the_model = False

    def __init__(self) -> None:
        self.module: Any = None
        self.said = 0

    def write(self, *_: Any) -> Any:
        raise NotImplementedError("it has conversations alone")

    def begin(self, policy: Any, head: Any, prompts: Any, eos: Any, pad: int) -> Any:
        return Saying(self, prompts.examples, pad)


class Saying:
    """A conversation of `Says`."""

    def __init__(self, engine: Says, examples: Any, pad: int) -> None:
        self.engine, self.examples, self.pad = engine, examples, pad
        self.read, self.turn = [0] * len(examples), 0

    def write(self, rows: list[int], heard: Any, rollout: Rollout, seeds: Any, ended: Any = None) -> Any:
        texts = [self.examples[row]["says"] if not self.turn else "2" for row in rows]
        self.engine.said += 0 if self.turn else len(rows)
        self.turn += 1
        tokenize = self.engine.module.tokenizer()
        ids = [tokenize(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"] for text in texts]
        width = max(map(len, ids))
        return torch.tensor([row + [self.pad] * (width - len(row)) for row in ids]), torch.zeros(len(ids), width)


def left_behind() -> dict[str, Any]:
    """What could be left: processes (orphans come to the one that reaps them), threads, descriptors, files."""
    tasks = Path(f"/proc/{os.getpid()}/task")
    return {
        "processes": sorted(
            p for task in tasks.iterdir() for p in (task / "children").read_text(encoding="utf-8").split()
        ),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "files": sorted(os.listdir(tempfile.gettempdir())),
    }


@pytest.fixture
def reaper():
    """Makes orphans of this process's children its own, as init would."""
    set_reaper = 36
    libc = ctypes.CDLL(None)
    assert libc.prctl(set_reaper, 1, 0, 0, 0) == 0
    yield
    libc.prctl(set_reaper, 0, 0, 0, 0)


def program(code: str, folder: Path) -> str:
    return code.replace("FOLDER", str(folder)).replace("PARENT", str(os.getpid()))


def test_there_are_200_and_20():
    texts = malformed(200)
    assert len({*texts}) == 200
    assert len(PROGRAMS) >= 20


def test_malformed_calls_are_answered_and_the_environment_never_fails():
    """Those that a parser takes for a call after all are called: the answer is then no error."""
    calculator, errors = Calculator(seconds=20), 0
    calculator._functions["python"] = lambda code: "called"
    for text in malformed(200):
        episode = Episode(calculator, {"prompt": "a"}, Rollout(turn_timeout=60))
        turn = episode.step(text)
        assert not episode.failed, text
        (message,) = turn.observation  # type: ignore[misc]
        assert len(message["content"]) <= 2100
        errors += message["content"].startswith("error: ")
    assert errors >= 180, errors


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts by /proc")
@pytest.mark.parametrize("ahead", [0, 1], ids=["main thread", "worker"])
def test_a_run_that_meets_them_trains_on_and_nothing_is_left(ahead, tmp_path, reaper):
    # 1. rows that say them, and a run on these
    folder = tmp_path / "reached"
    folder.mkdir()
    texts = malformed(200)
    texts += [
        f"<tool_call>{json.dumps({'name': 'python', 'arguments': {'code': program(code, folder)}})}</tool_call>"
        for code in PROGRAMS.values()
    ]
    rows = [{"prompt": str(number), "says": text} for number, text in enumerate(texts)]
    model = save_model(tmp_path / "model", tokenizer=family("byte_level"), max_position_embeddings=8192)
    engine = Says()
    rollout = Rollout(batch_size=28, horizon=8000, turns=2, turn_timeout=20, max_staleness=ahead)
    module = make_module(
        model,
        {},
        no_teacher(),
        environment=Calculator(seconds=1, describe=False),
        engine=engine,
        rollout=rollout,
        agreement=Agreement(tolerance=1e9),  # nobody's log-probs are those of a script
    )
    engine.module = module
    run_program("1", 20, 256, 100)  # what is loaded once is loaded
    before = left_behind()
    # 2. all of them, in eight steps
    trainer = fit(module, tmp_path / "run", rows, steps=8)
    assert trainer.global_step == 8
    assert engine.said >= len(texts)
    # 3. nothing is left
    deadline = time.monotonic() + 20
    while (after := left_behind()) != before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert after == before
    assert not list(folder.iterdir())
