"""The text quickstart with the overlays for several devices, on two processes of a CPU: killed and resumed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.faults.test_processes import children, equal
from tests.processes import finish, start
from tests.test_configs import ROOT

ON_A_CPU = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.precision=32-true"]
SMALL = [
    "--trainer.max_steps=8",
    "--trainer.val_check_interval=4",
    "--checkpoint.every_n_train_steps=1",
    "--data.train_options.count=256",
    "--data.validation_options.count=9",
    "--model.rollout.batch_size=8",
]


def quickstart(folder: Path, overlay: str, *extra: str):
    return start(
        ROOT / "text" / "quickstart.yaml",
        "-c",
        str(ROOT / "trainer" / f"{overlay}.yaml"),
        *ON_A_CPU,
        *SMALL,
        f"--trainer.default_root_dir={folder}",
        "--ckpt_path=last",
        *extra,
    )


def last(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def kill_all_ranks(process) -> None:
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.kill()


# a minute each on two cores, nearly all of it imports
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the other rank in /proc")
@pytest.mark.parametrize("overlay", ["ddp", "fsdp2"])
def test_a_kill_of_all_ranks_loses_nothing(overlay, tmp_path):
    finish(quickstart(tmp_path / "whole", overlay))
    expected = last(tmp_path / "whole")

    process = quickstart(tmp_path / "killed", overlay)
    process.wait_for(tmp_path / "killed" / "checkpoints" / "last.ckpt")
    kill_all_ranks(process)
    assert last(tmp_path / "killed")["global_step"] < 8
    finish(quickstart(tmp_path / "killed", overlay))
    found = last(tmp_path / "killed")
    assert found["global_step"] == 8
    equal(found["state_dict"], expected["state_dict"])


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["ddp", "fsdp2"])
def test_sigterm_ends_all_ranks_after_the_same_step(overlay, tmp_path):
    process = quickstart(tmp_path, overlay, "--trainer.max_steps=1000", "--trainer.limit_val_batches=0")
    process.wait_for(tmp_path / "checkpoints" / "last.ckpt")
    process.terminate()
    finish(process)
    assert "go on with --ckpt_path=last" in process.output
    assert 1 <= last(tmp_path)["global_step"] < 1000
