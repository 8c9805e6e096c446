"""`opd check`: what can be known of a run before its first step, line by line, with what to do about it.

Libraries are loaded by the look itself (`opd_lightning/look.py`), so that help does not wait for them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from rich.console import Console

from .finding import as_json, show, summary
from .front import front

APART = (
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--checkpoint.save_last=false",
    "--checkpoint.save_top_k=0",
    "--ckpt_path=null",
)
"""What is set otherwise than in the run: one device, and nothing is written where the run will be."""


def main(arguments: Sequence[str]) -> None:
    """Checks what can be known before the first step, and says what to do: -c FILE, as `opd fit` has it."""
    options, rest = parser().parse_known_args(arguments)
    from .forecast import memory_of
    from .look import looked, planned
    from .quiet import hush

    room = None if options.device_memory is None else memory_of(options.device_memory)
    sources = front(["fit", *rest])
    hush()
    folder = Path(_last(sources, "default_root_dir") or ".")
    # 1. the run, in a folder of its own; whatever it prints is no part of what programs read
    with tempfile.TemporaryDirectory() as apart, redirect_stdout(sys.stderr if options.json else sys.stdout):
        own = [*APART, f"--trainer.default_root_dir={apart}", f"--checkpoint.dirpath={apart}"]
        findings = planned([*rest, *own], room) if options.plan else looked(["fit", *rest, *own], folder, room)
    # 2. the verdict
    if options.json:
        json.dump(as_json(findings), sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        console = Console()
        show(findings, console)
        console.print(summary(findings), highlight=False)
    if any(finding.verdict == "bad" for finding in findings):
        sys.exit(1)


def parser() -> argparse.ArgumentParser:
    """Builds the parser; what it does not know is an argument of `opd fit`."""
    built = argparse.ArgumentParser(
        prog="opd check",
        description=main.__doc__,
        allow_abbrev=False,
        epilog="Exit code 0: green, 1: red, 2: the configuration can't be meant. Every other argument is one of `opd "
        "fit`. Models are loaded, and a few updates are made, timed and thrown away.",
    )
    built.add_argument("--json", action="store_true", help="print the findings for programs")
    built.add_argument("--device-memory", metavar="SIZE", help="compute memory for a GPU of this size, such as 24GB")
    built.add_argument("--plan", action="store_true", help="compute memory from the models' configurations alone")
    return built


def _last(sources: Sequence[Any], key: str) -> str | None:
    """Reads a key of the trainer from the last source that sets it."""
    given = [source.values.get("trainer") or {} for source in sources]
    return next((str(values[key]) for values in reversed(given) if values.get(key)), None)
