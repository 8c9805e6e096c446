"""Real training processes that are terminated, killed in part, or run out of disk."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.processes import Running, finish, last, start
from tests.test_resume import AHEAD, EMA, PLAIN, STEPS, configuration

TWO_RANKS = ["--trainer.devices=2", "--trainer.strategy=ddp"]
HALF = {**EMA, "rollout": {**EMA["rollout"], "batch_size": 8}}


@pytest.fixture(scope="module")
def text(make_world):
    return make_world("text")


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory):
    config = configuration(tmp_path_factory.mktemp("unbroken"), text, EMA)
    finish(start(config))
    return last(config)["state_dict"]


def start_until_saved(config: Path, *extra: str) -> Running:
    process = start(config, *extra)
    process.wait_for(config.parent / "checkpoints" / "last.ckpt")
    return process


def equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 0), (signal.SIGINT, 1), pytest.param(signal.SIGHUP, 0, marks=pytest.mark.slow)],
)
def test_a_signal_finishes_the_step_and_saves(number, code, text, unbroken, tmp_path):
    """With two micro-batches to a step, of which the first may be done."""
    config = configuration(tmp_path, text, EMA)
    process = start_until_saved(config, "--trainer.max_steps=1000", "--model.schedule.name=constant")
    os.kill(process.pid, number)
    assert process.end() == code
    assert f"{signal.Signals(number).name}: stopped after" in process.output
    assert "go on with --ckpt_path=last" in process.output
    assert 1 <= last(config)["global_step"] < 1000

    again = configuration(tmp_path / "again", text, EMA)
    process = start_until_saved(again)
    os.kill(process.pid, number)
    process.end()
    finish(start(again, "--ckpt_path=last"))
    equal(last(again)["state_dict"], unbroken)


@pytest.mark.parametrize(
    ("how", "signals"),
    [
        pytest.param("sleeps", 1, marks=pytest.mark.slow),
        pytest.param("sleeps", 2, marks=pytest.mark.slow),
        ("never_lets_go", 2),
    ],
)
def test_a_run_that_hangs_ends_all_the_same(how, signals, text, tmp_path):
    """After a while, or at the second signal; without cleaning up if it must be."""
    config = configuration(tmp_path, text, PLAIN)
    reward = {"class_path": "CallableReward", "init_args": {"function": f"tests.faults.breaking.{how}"}}
    process = start(broken(config, reward=reward), environment={"HANGING": str(tmp_path / "hanging")})
    process.wait_for(tmp_path / "hanging")
    for _ in range(signals):
        process.terminate()
        time.sleep(0.2)
    assert process.end() == 128 + signal.SIGTERM
    assert "SIGTERM: ends at once, before there is a checkpoint" in process.output


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_lasts(text, tmp_path):
    config = configuration(tmp_path, text, PLAIN)
    first = start_until_saved(config, "--trainer.max_steps=1000", "--model.schedule.name=constant")
    for how in ([], ["--ckpt_path=last"], ["--seed_everything=9", f"--checkpoint.dirpath={tmp_path / 'elsewhere'}"]):
        second = start(config, *how)
        assert second.end() != 0
        assert f"another run writes into {tmp_path}" in second.output
        assert f"process {first.pid} on" in second.output
    assert "max_steps: 1000" in (tmp_path / "config.yaml").read_text(encoding="utf-8")
    first.kill()
    finish(start(config, "--ckpt_path=last", "--trainer.max_steps=8", "--model.schedule.name=constant"))


def test_last_is_the_last_of_the_last_run(text, tmp_path):
    """Also in a folder that was moved in between, or where the run goes on from another of its checkpoints."""
    config = configuration(tmp_path / "run", text, PLAIN)
    checkpoints = tmp_path / "run" / "checkpoints"
    finish(start(config, "--trainer.max_steps=4"))
    finish(start(config, "--trainer.max_steps=2", "--seed_everything=5"))
    assert last(config)["global_step"] == 2
    assert torch.load(checkpoints / "earlier-1" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert sorted(path.name for path in checkpoints.iterdir()) == ["earlier-1", "last.ckpt", "step-2.ckpt"]

    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    moved = tmp_path / "moved" / "checkpoints"
    where = [f"--trainer.default_root_dir={tmp_path / 'moved'}", "--seed_everything=5"]
    config = tmp_path / "moved" / "run.yaml"
    finish(start(config, *where, "--ckpt_path=last", "--trainer.max_steps=3"))
    finish(start(config, *where, f"--ckpt_path={moved / 'step-3.ckpt'}", "--trainer.max_steps=5"))
    assert last(config)["global_step"] == 5
    assert not list(moved.glob("*-v*.ckpt"))


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(text, unbroken, tmp_path):
    config = configuration(tmp_path, text, EMA)
    finish(start(config, "--trainer.max_steps=5"))
    size = (config.parent / "checkpoints" / "last.ckpt").stat().st_size
    process = start(config, "--ckpt_path=last", largest_file=size // 2)
    assert process.end() != 0
    assert "could not be written" in process.output
    assert "the one before it is whole" in process.output
    assert last(config)["global_step"] == 5
    assert not list((config.parent / "checkpoints").glob("*.part"))


def test_a_truncated_checkpoint_is_refused_with_the_last_good_one(text, tmp_path):
    config = configuration(tmp_path, text, PLAIN)
    finish(start(config, "--trainer.max_steps=4"))
    folder = config.parent / "checkpoints"
    broken, (good,) = folder / "last.ckpt", folder.glob("step-*.ckpt")
    broken.write_bytes(broken.read_bytes()[:-1000])
    process = start(config, "--ckpt_path=last")
    assert process.end() != 0
    assert f"{broken} is cut short or no checkpoint at all" in process.output
    assert f"--ckpt_path={good}" in process.output.replace("\n", "")
    finish(start(config, f"--ckpt_path={good}", "--trainer.max_steps=6"))
    assert last(config)["global_step"] == 6


def test_what_a_kill_leaves_of_a_save_is_ignored(text, unbroken, tmp_path):
    config = configuration(tmp_path, text, EMA)
    start_until_saved(config).kill()
    part = config.parent / "checkpoints" / "last.ckpt.part"
    part.write_bytes(b"half of a")
    finish(start(config, "--ckpt_path=last"))
    equal(last(config)["state_dict"], unbroken)
    assert not part.exists()


def broken(config: Path, **settings: object) -> Path:
    """The configuration with other settings of the model, beside it."""
    changed = yaml.safe_load(config.read_text(encoding="utf-8"))
    changed["model"]["init_args"].update(settings)
    path = config.parent / "broken.yaml"
    path.write_text(yaml.safe_dump(changed), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("Breaks", "the gradient of optimizer step 5 is not finite"),
        pytest.param(
            "Greedy",
            "out of memory in the objective, whose chunks take 192 MiB of logits: lower",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_ends_a_run_in_the_objective_loses_nothing(part, message, text, unbroken, tmp_path):
    """In the second of the two micro-batches of a step."""
    config = configuration(tmp_path, text, EMA)
    signals = {"class_path": f"tests.faults.breaking.{part}", "init_args": {"at": 10}}
    process = start(broken(config, objective={"terms": [{"signal": signals}]}))
    assert process.end() != 0
    assert message in process.output
    assert last(config)["global_step"] == 4
    finish(start(config, "--ckpt_path=last", "--checkpoint.may_change=[model.objective]"))
    equal(last(config)["state_dict"], unbroken)


def test_an_exception_in_the_thread_that_rolls_out_ends_the_process_and_names_the_view(text, tmp_path):
    config = configuration(tmp_path, text, AHEAD)
    process = start(broken(config, student_view={"class_path": "tests.faults.breaking.FailsAhead"}))
    assert process.end() != 0
    assert "RuntimeError: the tenth example fails (shown by FailsAhead)" in process.output


def children(process: int) -> list[int]:
    return [
        int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()
    ]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the other rank in /proc")
def test_a_killed_rank_ends_the_run_and_loses_nothing(text, tmp_path):
    config = configuration(tmp_path / "whole", text, HALF)
    finish(start(config, *TWO_RANKS))
    expected = last(config)["state_dict"]

    config = configuration(tmp_path / "killed", text, HALF)
    process = start_until_saved(config, *TWO_RANKS)
    for child in children(process.pid):
        if "opd_lightning" in Path(f"/proc/{child}/cmdline").read_text(encoding="utf-8"):
            os.kill(child, signal.SIGKILL)
    assert process.end() != 0
    seen = last(config)["global_step"]
    assert seen < STEPS
    finish(start(config, "--ckpt_path=last", *TWO_RANKS))
    equal(last(config)["state_dict"], expected)
