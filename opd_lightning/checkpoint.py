"""Checkpoints: their contents, and the steps at which they are written."""

from __future__ import annotations

import os
import shlex
import signal
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.seed import _collect_rng_states
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from .adapters import adapter_parameters
from .config_file import did_you_mean
from .ending import Ending
from .folder import RunLock, forget_samples_after, set_aside
from .pretrained import Pretrained
from .printable import printable


def kept_names(student: nn.Module, names: Iterable[str], spec: Pretrained) -> set[str]:
    """Names of the state that a checkpoint holds: trained weights, adapters and EMA teachers; of bases a drawn one.

    Args:
        student: the model.
        names: of all state of the run; the student's begin with ``student.``.
        spec: what the student was loaded from.
    """
    if spec.lora is None or spec.random_init:  # nobody else has the drawn base
        return set(names)
    # a tied head is the same parameter under a second name
    trained = {name for name, p in student.named_parameters(remove_duplicate=False) if p.requires_grad}
    kept = {f"student.{name}" for name in trained | adapter_parameters(student).keys()}
    return {name for name in names if name in kept or not name.startswith("student.")}


def plain_rng_states() -> dict[str, Any]:
    """Converts RNG states to tensors, numbers, lists and tuples only, so that ``weights_only=True`` loads them."""
    states = _collect_rng_states()
    name, keys, *rest = states["numpy"]
    return {**states, "numpy": (name, keys.tolist(), *rest)}


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
        if "://" in str(path):
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
            if file.is_dir() or zipfile.is_zipfile(file):
                times[file] = file.stat().st_mtime
    return max(times, key=times.__getitem__, default=None)


def check_whole(checkpoint: Path) -> None:
    """Refuses checkpoints that are missing or cut short.

    Raises:
        ValueError: there is no such file, or it was cut short; the message names the newest one beside it that was not.
    """
    if checkpoint.is_dir():
        return  # a sharded one of another strategy
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


def check_ours(checkpoint: Path) -> None:
    """Refuses files that are no checkpoints of `opd fit`.

    Raises:
        ValueError: as in `check_whole`; it is a run's folder, or none of `opd fit`'s checkpoints.
    """
    check_whole(checkpoint)
    if checkpoint.is_dir():
        if (last := next(checkpoint.rglob("last.ckpt"), None)) is not None:
            raise ValueError(f"{checkpoint} is a folder; its last checkpoint is {last}")
        return
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


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, under ``<default_root_dir>/checkpoints`` and with ``last.ckpt`` to resume from.

    At a step that is validated it is written after the validation, which callbacks may go by: a resumed run does not do
    that one again.

    After a SIGTERM (or SIGHUP) the optimizer step is finished on every rank, ``last.ckpt`` is written, and the run ends
    as if it were done, with exit code 0: a queue may start it again with ``--ckpt_path=last``. After a SIGINT (Ctrl-C)
    likewise, with exit code 1. A second signal ends the run at once, as does an optimizer step that hangs (`Ending`).

    One run at a time writes into a folder (`RunLock`), and its last checkpoint is ``last.ckpt``: what an earlier run
    left there is moved into ``earlier-<n>`` beside it, unless this one goes on from it.

    Args:
        every_n_train_steps: optimizer steps between checkpoints.
        dirpath, monitor, mode, save_top_k, save_last: as in Lightning.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = 100,
        dirpath: str | None = None,
        monitor: str | None = None,
        mode: str = "max",
        save_top_k: int = 1,
        save_last: bool = True,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step-{step}",
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=save_last,
            every_n_train_steps=every_n_train_steps,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,  # steps count, not epochs
        )

        # within a run a name is a step; those of other runs are set aside
        self._enable_version_counter = False
        self._ending = Ending()
        self._locks: list[RunLock] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._settle(trainer)
        # the default exactly: a plugin that somebody chose stays
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicIO()
        if stage == "fit":
            self._lock(trainer)  # before Lightning lists the folder: another run may be removing files of it
        super().setup(trainer, pl_module, stage)

    def _lock(self, trainer: L.Trainer) -> None:
        """Takes the run's folders on rank 0; all ranks raise what it raised."""
        refusal: Exception | None = None
        if trainer.is_global_zero:
            try:
                for folder in sorted({str(self.dirpath), str(trainer.default_root_dir)}):
                    if "://" not in folder:
                        self._locks.append(RunLock(folder))
                        self._locks[-1].acquire()
            except (OSError, RuntimeError) as error:
                refusal = error
        refusal = trainer.strategy.broadcast(refusal)
        if refusal is not None:
            raise refusal

    def _listen(self, trainer: L.Trainer) -> None:
        # in place of Lightning's handlers, which end a run between any two batches, in the middle of an optimizer step
        # too, and do not end an evaluation at all
        launcher: Any = trainer.strategy.launcher
        forward = (lambda _: None) if launcher is None else launcher.kill
        trains = trainer.state.fn == TrainerFn.FITTING

        def left() -> str:
            there = (
                trainer.ckpt_path is not None or "://" in self.last_model_path or Path(self.last_model_path).is_file()
            )
            return (
                "at the last checkpoint" if there else "before there is a checkpoint: nothing was trained that is kept"
            )

        self._ending = Ending(forward, waits=trains, left=left if trains else None)
        self._ending.listen()

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._listen(trainer)

    on_test_start = on_predict_start = on_validation_start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._listen(trainer)
        assert self.dirpath is not None
        here, root = Path(self.dirpath), Path(trainer.default_root_dir)
        self.last_model_path = str(here / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        if trainer.is_global_zero and "://" not in str(here):
            if trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve().parent == here.resolve():
                forget_samples_after(trainer.global_step, root)
            elif apart := set_aside(here, root):
                rank_zero_info(f"What an earlier run left in {here} is now in {apart}")
        # nobody writes or reads there before files were moved
        trainer.strategy.barrier("set aside")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._end()

    def _end(self) -> None:
        self._ending.over()
        for lock in self._locks:
            lock.release()
        self._locks = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # gradients are in no checkpoint, so one is written between optimizer steps only
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._every_n_train_steps and trainer.global_step % self._every_n_train_steps == 0 and _validates(trainer):
            self._defer_save_until_validation = True
        else:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._ending.step_done()
        # every rank asks at every step: a signal to one of them ends all after the same step
        if trainer.strategy.reduce_boolean_decision(self._ending.number is not None, all=False):
            if self._last_global_step_saved != trainer.global_step:
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            name = "SIGTERM" if self._ending.number is None else signal.Signals(self._ending.number).name
            rank_zero_info(f"{name}: stopped after optimizer step {trainer.global_step}; go on with --ckpt_path=last")
            if self._ending.number == signal.SIGINT:
                raise KeyboardInterrupt
            trainer.should_stop = True

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        # `--ckpt_path=last` is looked up before setup
        self._settle(trainer)
        if "://" in str(self.dirpath):
            return super()._find_last_checkpoints(trainer)
        # Lightning lists the folder, and fails on a file that the run which writes there removes meanwhile
        last = Path(str(self.dirpath)) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        return {str(last)} if last.exists() or last.is_symlink() else set()  # a link to nothing is told

    def folder(self, trainer: L.Trainer) -> Path:
        """Returns the folder of its checkpoints."""
        self._settle(trainer)
        return Path(str(self.dirpath))

    def _settle(self, trainer: L.Trainer) -> None:
        self.dirpath = self.dirpath or os.path.join(trainer.default_root_dir, "checkpoints")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.global_step and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        if trainer.is_global_zero and (last := self.folder(trainer) / "last.ckpt").exists():
            print(
                printable(f"the last checkpoint is {last}; `opd export {shlex.quote(str(last))} DIR` writes its model")
            )


def _validates(trainer: L.Trainer) -> bool:
    """Tells whether a validation follows upon this batch."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    batches: Any = trainer.num_val_batches
    return (
        trainer.enable_validation and bool(np.sum(batches)) and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
    )
