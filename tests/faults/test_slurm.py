"""The script for SLURM, with stand-ins for `srun` and `scontrol`: a time limit, an error, a run that is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import last
from tests.test_resume import PLAIN, STEPS, configuration

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm.sh"


def submit(folder: Path, *arguments: str) -> subprocess.Popen:
    """Runs the script as job 17; requeueing it is written to ``requeued``."""
    tools = folder / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    opd = f'exec "{sys.executable}" -m opd_lightning "$@"'
    for name, body in {"srun": 'exec "$@"', "opd": opd, "scontrol": f'echo "$@" >> {folder / "requeued"}'}.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    return subprocess.Popen(["bash", str(SCRIPT), *arguments], env=environment)


@pytest.mark.slow
def test_a_time_limit_requeues_and_the_job_goes_on_to_its_end(make_world, tmp_path):
    config = configuration(tmp_path / "run", make_world("text"), PLAIN)
    checkpoint = config.parent / "checkpoints" / "last.ckpt"
    job = submit(tmp_path, "-c", str(config), "--trainer.max_steps=100000", "--model.schedule.name=constant")
    while not checkpoint.exists() and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 0
    assert (tmp_path / "requeued").read_text(encoding="utf-8") == "requeue 17\n"
    done = last(config)["global_step"]
    assert done < 100000

    steps = f"--trainer.max_steps={done + 2}"
    assert submit(tmp_path, "-c", str(config), steps, "--model.schedule.name=constant").wait() == 0
    assert last(config)["global_step"] == done + 2
    assert (tmp_path / "requeued").read_text(encoding="utf-8") == "requeue 17\n"


@pytest.mark.slow
def test_an_error_is_not_tried_again(make_world, tmp_path):
    config = configuration(tmp_path / "run", make_world("text"), PLAIN)
    assert submit(tmp_path, "-c", str(config), f"--trainer.max_steps={STEPS}", "--data.train=nowhere.jsonl").wait() != 0
    assert not (tmp_path / "requeued").exists()
