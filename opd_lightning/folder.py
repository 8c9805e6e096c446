"""The folder of a run: one run at a time writes into it, and files of earlier runs are moved aside."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows processes are told by their numbers alone
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"
WRITTEN = SAMPLES, ALARMS, SPIKES = "samples.jsonl", "alarms.jsonl", "spikes.jsonl"
VERSIONS = "logs/version_*"
"""Folders of logs: one of each training, and one more of each that went on, or was validated."""
# what else a report tells of, and what it leaves
TOLD = "rollouts.jsonl", "grids", "report.html", "comparison.html", "result.json", "curves.png"
# Seconds between signs of life, and without one after which a run on another machine counts as dead
BEAT, SILENCE = 10.0, 45.0


def check_folder(folder: str | Path) -> Path:
    """Creates the folder if need be, and returns its path.

    Raises:
        OSError: nothing can be written there; the message names the key.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        what = "is a file, no folder" if path.is_file() else f"can't be written into ({error.strerror or error})"
        raise OSError(f"trainer.default_root_dir: {path} {what}; name a folder that may be written into") from error
    return path


class RunLock:
    """Lock of a folder, for one run at a time: ``run.lock`` names the run there, and is gone when that has ended.

    A lock whose process is dead is taken over. On this machine, and wherever the file system shares locks, the system's
    own lock on the file tells; on another machine the file's time does, which a living run renews every 10 seconds.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / LOCK
        self._file: int | None = None
        self._over = threading.Event()

    def acquire(self) -> None:
        """Takes the lock, and begins to renew it.

        Raises:
            RuntimeError: another run writes into the folder.
            OSError: nothing can be written there.
        """
        check_folder(self.path.parent)
        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            owner = self._read(file)
            if not self._free(file, owner):
                os.close(file)
                self._refuse(owner)
            if self._is_there(file):
                self._file = file
            else:  # its owner has just removed it
                os.close(file)
        note = {"process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(note).encode(), 0)
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        if self._file is not None:
            self._over.set()
            if self._is_there(self._file):
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def _free(self, file: int, owner: dict[str, Any]) -> bool:
        here, process = owner.get("machine") == socket.gethostname(), owner.get("process", 0)
        locked = _system_lock(file)
        if locked is False:
            if here and not _lives(process) and self._is_there(file):
                # processes that the dead one forked hold it still: the file goes, and so does their lock
                self.path.unlink(missing_ok=True)
                return True
            return False
        if not owner or here:
            return not owner or locked is True or process == os.getpid() or not _lives(process)
        return self._is_silent(owner)

    def _is_silent(self, owner: dict[str, Any]) -> bool:
        """Waits for a sign of life of a run on another machine; True if there is none."""
        from lightning.pytorch.utilities import rank_zero_info  # reports read this file's names, and wait for no import

        rank_zero_info(
            f"{self.path} is of process {owner.get('process')} on {owner.get('machine')}; waiting for "
            f"{SILENCE:.0f} s to see whether it lives"
        )
        before, end = self._renewed(), time.monotonic() + SILENCE
        while time.monotonic() < end and self._renewed() == before:
            time.sleep(min(1.0, SILENCE))
        return self._renewed() == before

    def _renewed(self) -> int:
        try:
            with self.path.open("rb") as file:  # opening it makes a network file system look anew
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return 0

    def _refuse(self, owner: dict[str, Any]) -> None:
        note = {"process": "?", "machine": "?", "since": "?"} | owner
        run = "process {process} on {machine}, since {since}".format_map(note)
        raise RuntimeError(
            f"another run writes into {self.path.parent}: {run}. Wait for it or end it, or give this one another "
            "trainer.default_root_dir"
        )

    def _is_there(self, file: int) -> bool:
        try:
            return os.fstat(file).st_ino == self.path.stat().st_ino
        except FileNotFoundError:
            return False

    @staticmethod
    def _read(file: int) -> dict[str, Any]:
        try:
            note = json.loads(os.pread(file, 4096, 0))
        except ValueError:
            return {}
        return note if isinstance(note, dict) else {}

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            try:
                os.utime(self.path)
            except OSError:  # the folder is gone or read-only, which whoever writes into it will say
                continue


def _system_lock(file: int) -> bool | None:
    """Tries to take the system's lock on the file: True if this process has it; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def set_aside(checkpoints: Path, folder: Path, begun: Iterable[Path] = ()) -> Path | None:
    """Moves an earlier run's files into ``<checkpoints>/earlier-<n>``: checkpoints, logs, reports, what lies beside.

    Args:
        checkpoints: folder of the checkpoints.
        folder: of the run.
        begun: folders that loggers of the new run write into, which stay.
    """
    own = {path.resolve() for path in begun}
    left = {path: path.name for path in sorted(checkpoints.glob("*.ckpt"))}
    for pattern in (*WRITTEN, *TOLD, VERSIONS):
        left |= {path: str(path.relative_to(folder)) for path in folder.glob(pattern) if path.resolve() not in own}
    if not left:
        return None
    apart = next(path for n in count(1) if not (path := checkpoints / f"earlier-{n}").exists())
    for path, name in left.items():
        (apart / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, apart / name)
    return apart


def kept_apart(path: Path) -> Path | None:
    """Moves a file of an earlier run beside itself, with ``.earlier-<n>`` in its name; None: it holds nothing."""
    if not path.exists() or not path.stat().st_size:
        return None
    names = (path.with_name(f"{path.stem}.earlier-{n}{path.suffix}") for n in count(1))
    return path.rename(next(name for name in names if not name.exists()))


def forget_samples_after(step: int, folder: Path) -> None:
    """Removes the lines of what was written after the checkpoint that a run resumes from."""
    for path in (folder / name for name in WRITTEN):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        before = [line for line in lines if _step(line) <= step]
        if len(before) < len(lines):
            partial = path.with_name(f"{path.name}.part")
            partial.write_text("".join(before), encoding="utf-8")
            partial.replace(path)


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
