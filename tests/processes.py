"""`opd` in processes of its own, forked from one that has imported everything: imports take longer than a short run."""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["opd_lightning.cli", "opd_lightning.modalities", "opd_lightning.callbacks"])


@dataclass
class Running:
    """A run: one process, or one for each rank; ``log`` is a file with what they print."""

    ranks: list[BaseProcess]
    log: IO[str]

    @property
    def pid(self) -> int:
        assert self.ranks[0].pid is not None
        return self.ranks[0].pid

    @property
    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def end(self) -> int:
        """Waits for the exit code: 0 if that of every rank is. (How long a test may take says pytest's ``timeout``.)"""
        try:
            for rank in self.ranks:
                rank.join()
        finally:
            self.kill()
            print(self.output)
        return next((rank.exitcode for rank in self.ranks if rank.exitcode), 0)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def wait_for(self, checkpoint: Path) -> None:
        """Until it is there."""
        while not checkpoint.exists() and self.ranks[0].is_alive():
            time.sleep(0.01)
        assert checkpoint.exists(), self.output


def _opd(arguments: list[str], log: str, environment: dict[str, str], largest_file: int | None) -> None:
    """What ``python -m opd_lightning`` does, in the forked process."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(number, handler)  # what a shell starts in the background ignores them
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.path.insert(0, os.getcwd())
    sys.argv = ["opd", *arguments]
    runpy.run_module("opd_lightning", run_name="__main__", alter_sys=True)


def start(
    config: Path,
    *extra: str,
    command: str = "fit",
    ranks: int | None = None,
    largest_file: int | None = None,
    environment: dict[str, str] | None = None,
) -> Running:
    """`opd` with a configuration.

    Args:
        ranks: one process for each, which find one another as those of a cluster do; without it the configuration
            says how many, and Lightning starts those after the first.
        largest_file: in bytes; larger ones can't be written, as if the disk were full.
        environment: further variables.
    """
    arguments = [command, "-c", str(config), *extra]
    environments: list[dict[str, str]] = [environment or {}]
    if ranks is not None:
        arguments.append(f"--trainer.devices={ranks}")
    if ranks is not None and ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        place |= environment or {}
        environments = [{**place, "NODE_RANK": "0", "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    log = tempfile.NamedTemporaryFile("r", encoding="utf-8", suffix=".log")  # noqa: SIM115  (it is there as long as the run is asked for)
    processes = [
        FORKS.Process(target=_opd, args=(arguments, log.name, own, largest_file), daemon=True) for own in environments
    ]
    for process in processes:
        process.start()
    return Running(processes, log)


def finish(run: Running) -> None:
    assert run.end() == 0, run.output


def last(config: Path) -> dict:
    return torch.load(config.parent / "checkpoints" / "last.ckpt", weights_only=True)
