"""Files of checkpoints: written whole, and checked before anything is loaded."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.seed import _collect_rng_states

from .config_file import did_you_mean
from .remote import exists, is_url, is_whole


def plain_rng_states() -> dict[str, Any]:
    """Converts RNG states to tensors, numbers, lists and tuples only, so that ``weights_only=True`` loads them."""
    states = _collect_rng_states()
    name, keys, *rest = states["numpy"]
    return {**states, "numpy": (name, keys.tolist(), *rest)}


REST = "rest.pt"
"""File of a checkpoint in slices that is written last (`slices`)."""


def is_slices(path: str | Path) -> bool:
    """Tells whether a folder is a checkpoint in slices, and whole."""
    return Path(path, REST).is_file()


class AtomicIO(TorchCheckpointIO):
    """Writes beside the target and renames: a checkpoint is there whole, or the one before it still is.

    Lightning's own writes to the system's temporary folder first; from another disk a move is a copy, which a kill can
    cut short.
    """

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Tensors, numbers and text, wherever they come from; Lightning would unpickle anything that a URL gives."""
        return super().load_checkpoint(path, map_location or (lambda storage, _: storage), weights_only=True)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint beside its place, and moves it there when it is complete.

        Raises:
            OSError: it could not be written (the disk is full, …).
        """
        if is_url(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        part = target.with_name(f"{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                # contents reach the disk before the name does: a rename alone could survive a crash empty
                file.flush()
                os.fsync(file.fileno())
            if is_slices(target):  # what the same name was in another form
                shutil.rmtree(target)
            part.replace(target)
        except (OSError, RuntimeError) as error:  # torch's zip writer wraps what the disk said
            with suppress(OSError):  # the folder became read-only
                part.unlink(missing_ok=True)
            before = f"; the one before it is whole: {intact}" if (intact := newest_whole(target.parent)) else ""
            raise OSError(f"the checkpoint {target} could not be written ({error}){before}") from error


def newest_whole(folder: Path) -> Path | None:
    """Finds the newest checkpoint that is not cut short; None if there is none."""
    times: dict[Path, float] = {}
    for file in folder.glob("*.ckpt"):
        with suppress(FileNotFoundError):  # a run that writes there has just removed it
            if is_slices(file) or (file.is_file() and zipfile.is_zipfile(file)):
                times[file] = file.stat().st_mtime
    return max(times, key=times.__getitem__, default=None)


def check_whole(checkpoint: str | Path) -> None:
    """Refuses checkpoints that are missing or cut short.

    Raises:
        ValueError: there is no such file, or it was cut short; the message names the newest one beside it that was not.
    """
    if is_url(checkpoint):
        if not exists(str(checkpoint)):
            raise ValueError(f"there is no file {checkpoint}")
        if not is_whole(str(checkpoint)):
            raise ValueError(f"{checkpoint} is cut short or no checkpoint at all")
        return
    checkpoint = Path(checkpoint)
    if checkpoint.is_dir():
        return  # `check_ours` looks into it
    intact = newest_whole(checkpoint.parent)
    advice = f"the newest whole one beside it is --ckpt_path={intact}" if intact else "there is no whole one beside it"
    if not checkpoint.exists():
        there = checkpoint.parent.iterdir() if checkpoint.parent.is_dir() else ()
        near = f"; {advice}" if intact else did_you_mean(checkpoint, map(str, there))
        raise ValueError(f"there is no file or folder {checkpoint}{near}")
    if not os.access(checkpoint, os.R_OK):
        raise ValueError(f"{checkpoint} can't be read: it is another user's")
    if not zipfile.is_zipfile(checkpoint):
        raise ValueError(f"{checkpoint} is cut short or no checkpoint at all; {advice}")


def check_ours(checkpoint: str | Path) -> None:
    """Refuses files that are no checkpoints of `opd fit`; of those elsewhere, missing ones and parts.

    Raises:
        ValueError: as in `check_whole`; it is a run's folder, or none of `opd fit`'s checkpoints.
    """
    check_whole(checkpoint)
    if is_url(checkpoint):
        return
    checkpoint = Path(checkpoint)
    if checkpoint.is_dir():
        if is_slices(checkpoint):
            return
        if (last := next(checkpoint.rglob("last.ckpt"), None)) is not None:
            raise ValueError(f"{checkpoint} is a folder; its last checkpoint is {last}")
        raise ValueError(f"{checkpoint} is a folder and no checkpoint, or one in slices that is not whole")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError) as error:
        raise ValueError(f"{checkpoint} is no checkpoint of `opd fit`: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not {"state_dict", "loops", "made_with"} <= content.keys():
        raise ValueError(f"{checkpoint} is no checkpoint of `opd fit`, or one of an earlier version")


def check_named(path: str, folders: Sequence[Path]) -> None:
    """Refuses a path that is missing but nearly the name of a checkpoint of the run.

    Raises:
        ValueError: there is no such file, but one of nearly that name in these folders of the run.
    """
    if Path(path).exists():
        return
    there = {file.name: str(file) for folder in folders for file in folder.glob("*.ckpt")}
    names = {"last": "last"} | there if "last.ckpt" in there else there
    if near := get_close_matches(Path(path).name, names, n=1):
        raise ValueError(f"--ckpt_path={path}: there is no such file; did you mean {names[near[0]]}?")
