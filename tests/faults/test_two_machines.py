"""Two "machines" of one process each, by torchrun: one is killed, both are started again, and nothing is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.test_processes import HALF, equal
from tests.processes import finish, last, start
from tests.test_resume import STEPS, configuration


def machine(number: int, port: int, config: Path, strategy: str, *extra: str) -> subprocess.Popen:
    """Starts what is started on a machine, in a process group of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    place = [f"--node-rank={number}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    run = ["-m", "opd_lightning", "fit", "-c", str(config), "--trainer.num_nodes=2", "--trainer.devices=1"]
    command = [*torchrun, *place, *run, f"--trainer.strategy={strategy}", "--ckpt_path=last", *extra]
    return subprocess.Popen(command, start_new_session=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def machines(config: Path, strategy: str, *extra: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [machine(number, port, config, strategy, *extra) for number in range(2)]


def unplug(one: subprocess.Popen) -> None:
    """Kills all that runs on a machine: ranks are in sessions of their own."""
    for process in [*psutil.Process(one.pid).children(recursive=True), psutil.Process(one.pid)]:
        process.kill()
    one.wait()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2_slices"])
def test_a_machine_that_dies_ends_the_run_which_goes_on_when_both_are_there(strategy, make_world, tmp_path):
    config = configuration(tmp_path / "whole", make_world("text"), HALF)
    finish(start(config, f"--trainer.strategy={strategy.removesuffix('_slices')}", ranks=2))
    expected = last(config)["state_dict"]

    config = configuration(tmp_path / "broken", make_world("text"), HALF)
    checkpoint = config.parent / "checkpoints" / "last.ckpt"
    first, second = machines(config, strategy)
    while not checkpoint.exists() and first.poll() is None:
        time.sleep(0.01)
    unplug(second)
    assert first.wait() != 0
    assert checkpoint.exists()

    one_file = "--trainer.strategy=fsdp2" if strategy != "ddp" else "--trainer.strategy=ddp"
    for each in machines(config, strategy, one_file):
        assert each.wait() == 0
    assert last(config)["global_step"] == STEPS
    equal(last(config)["state_dict"], expected)
