"""The folder of a run: locked, and tidy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from opd_lightning import folder
from opd_lightning.folder import RunLock, check_folder, forget_samples_after, set_aside

HOLDS = (
    "import sys, time; from opd_lightning.folder import RunLock; lock = RunLock(sys.argv[1]); lock.acquire(); print(1)"
)


def holder(path):
    """Another process that has the lock; a line comes when it has."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{HOLDS}; sys.stdout.flush(); time.sleep(600)", str(path)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def owned(path, **owner):
    (path / folder.LOCK).write_text(json.dumps({"process": os.getpid(), "since": "then"} | owner), encoding="utf-8")


def test_a_folder_is_one_runs_until_it_ends_or_dies(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(
        RuntimeError, match=rf"another run writes into {tmp_path}: process {process.pid} on .* since 20"
    ):
        RunLock(tmp_path).acquire()
    process.kill()
    process.wait()
    mine = RunLock(tmp_path)
    mine.acquire()
    assert json.loads((tmp_path / folder.LOCK).read_text(encoding="utf-8"))["process"] == os.getpid()
    with pytest.raises(RuntimeError, match="another run"):
        RunLock(tmp_path).acquire()
    mine.release()
    assert not list(tmp_path.iterdir())
    RunLock(tmp_path).acquire()


def test_a_lock_that_children_of_a_dead_run_inherited_is_taken_over(tmp_path):
    """They were forked and have its files open."""
    script = f"{HOLDS}; sys.stdout.flush(); import os; os.fork() or time.sleep(30)"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.wait()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_a_lock_of_another_machine_is_taken_over_when_it_falls_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "SILENCE", 0.2)
    owned(tmp_path, machine="elsewhere")
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()

    owned(tmp_path, machine="elsewhere", process=17)
    times = iter(range(9))
    monkeypatch.setattr(RunLock, "_renewed", lambda _: next(times))
    with pytest.raises(RuntimeError, match=r"another run writes into .* process 17 on elsewhere, since then"):
        RunLock(tmp_path).acquire()


def test_a_living_run_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "BEAT", 0.01)
    lock = RunLock(tmp_path)
    lock.acquire()
    os.utime(lock.path, (1, 1))
    end = time.monotonic() + 60
    while lock.path.stat().st_mtime == 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert lock.path.stat().st_mtime > 1
    lock.release()


@pytest.mark.parametrize("content", ["", "no JSON", "[]", "{}"])
def test_a_lock_that_says_nothing_is_taken_over(content, tmp_path):
    (tmp_path / folder.LOCK).write_text(content, encoding="utf-8")
    RunLock(tmp_path).acquire()


def test_a_folder_that_is_a_file_or_below_one_is_named(tmp_path):
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match=r"trainer\.default_root_dir: .*taken is a file, no folder; name"):
        check_folder(tmp_path / "taken")
    with pytest.raises(
        OSError, match=r"trainer\.default_root_dir: .*taken/run can't be written into \(Not a directory\)"
    ):
        check_folder(tmp_path / "taken" / "run")


def test_what_an_earlier_run_left_is_kept_apart(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (tmp_path / "config.yaml").touch()
    assert set_aside(checkpoints, tmp_path) is None
    for n in (1, 2):
        for name in ("checkpoints/last.ckpt", "checkpoints/step-3.ckpt", "samples.jsonl", "report.html"):
            (tmp_path / name).write_text(str(n), encoding="utf-8")
        assert set_aside(checkpoints, tmp_path) == checkpoints / f"earlier-{n}"
    assert [path.read_text(encoding="utf-8") for path in sorted(checkpoints.glob("*/*"))] == ["1"] * 4 + ["2"] * 4
    assert not list(checkpoints.glob("*.ckpt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.yaml"]


def test_logs_of_an_earlier_run_are_kept_apart_and_those_that_the_new_one_has_begun_stay(tmp_path):
    """Also of a run that ended before it had a checkpoint."""
    checkpoints = tmp_path / "checkpoints"
    for version in range(3):
        (tmp_path / "logs" / f"version_{version}").mkdir(parents=True)
        (tmp_path / "logs" / f"version_{version}" / "metrics.csv").write_text(str(version), encoding="utf-8")
    (tmp_path / "logs" / "own").mkdir()
    (tmp_path / "grids").mkdir()
    (tmp_path / "grids" / "student.png").touch()
    apart = set_aside(checkpoints, tmp_path, [tmp_path / "logs" / "version_2", tmp_path / "elsewhere"])
    assert apart == checkpoints / "earlier-1"
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["own", "version_2"]
    assert (apart / "logs" / "version_1" / "metrics.csv").read_text(encoding="utf-8") == "1"
    assert (apart / "grids" / "student.png").exists()
    assert not (tmp_path / "grids").exists()


def test_samples_of_steps_that_are_done_again_are_forgotten(tmp_path):
    path = tmp_path / "samples.jsonl"
    forget_samples_after(3, tmp_path)
    path.write_text(
        "".join(json.dumps({"step": step, "prompt": "ü"}) + "\n" for step in (0, 3, 4, 9)) + '{"step": 1',
        encoding="utf-8",
    )
    (tmp_path / "alarms.jsonl").write_text('{"step": 3}\n{"step": 4}\n', encoding="utf-8")
    forget_samples_after(3, tmp_path)
    assert (tmp_path / "alarms.jsonl").read_text(encoding="utf-8") == '{"step": 3}\n'
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()[:2]] == [0, 3]
    assert "9" not in path.read_text(encoding="utf-8")
