"""Checkpoints: their contents, and the steps at which they are written."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from .background_io import BackgroundIO
from .ending import Ending
from .folder import RunLock, forget_samples_after, set_aside
from .heart import HEART
from .printable import printable
from .remote import exists, is_url, join, move, parent, set_checkpoints_aside
from .resume import rewind
from .slices import CheckpointIO, restored
from .watchdog import Watchdog, can_go_back

LAST = "last.ckpt"


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
        dirpath: a folder, or a URL that fsspec knows (``s3://…``), where nothing is locked.
        monitor, mode, save_top_k, save_last: as in Lightning.
        may_change: keys, such as ``model.objective`` or ``trainer.callbacks``, in which a run that goes on may differ
            from its checkpoint. What decides what is trained, and how, is refused unless it is named here
            (docs/reliability.md).
        hang_limit: seconds without progress on any rank after which the run ends with exit code 75, the stacks of all
            ranks in ``hang.txt``, and the last whole step in ``last.ckpt`` (`Watchdog`); None: it hangs. Default 1,200,
            less than the half hour after which torch gives up on a collective. One forward pass, one reward and one
            answer of a server must take less.
        asynchronous: training goes on while a thread writes a checkpoint from a copy in the memory of the host, of
            which there are up to two; a run that is killed meanwhile has the one before. Not with ``fsdp2_slices``.
            Default: training waits.

    Raises:
        ValueError: a limit that is not positive; `asynchronous` where ranks write slices, or with a plugin for files of
            somebody else.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = 100,
        dirpath: str | None = None,
        monitor: str | None = None,
        mode: str = "max",
        save_top_k: int = 1,
        save_last: bool = True,
        may_change: Sequence[str] = (),
        hang_limit: float | None = 1200.0,
        asynchronous: bool = False,
    ) -> None:
        if hang_limit is not None and not hang_limit > 0:
            raise ValueError(f"checkpoint.hang_limit is {hang_limit} s; it must be > 0, or null for no limit")
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
        self.may_change, self.hang_limit, self.asynchronous = list(may_change), hang_limit, asynchronous
        self._ending = Ending()
        self._watchdog: Watchdog | None = None
        self._locks: list[RunLock] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._settle(trainer)
        # the default exactly: a plugin that somebody chose stays
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = BackgroundIO() if self.asynchronous else CheckpointIO()
        sliced = getattr(trainer.strategy, "checkpoints", "file") != "file"
        if self.asynchronous and (sliced or not isinstance(trainer.strategy.checkpoint_io, BackgroundIO)):
            by = "ranks write slices together" if sliced else f"{type(trainer.strategy.checkpoint_io).__name__} writes"
            raise ValueError(f"checkpoint.asynchronous: {by}, which training has to wait for; set it to false")
        if stage == "fit":
            self._lock(trainer)  # before Lightning lists the folder: another run may be removing files of it
        super().setup(trainer, pl_module, stage)

    def _lock(self, trainer: L.Trainer) -> None:
        """Takes the run's folders on rank 0; all ranks raise what it raised."""
        refusal: Exception | None = None
        if trainer.is_global_zero:
            try:
                for folder in sorted({str(self.dirpath), str(trainer.default_root_dir)}):
                    if not is_url(folder):
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
        trains = trainer.state.fn == TrainerFn.FITTING

        left = partial(self._left, trainer)
        io: Any = trainer.strategy.checkpoint_io
        writing = (lambda: io.is_writing) if isinstance(io, BackgroundIO) else (lambda: False)
        self._ending = Ending(_forward(trainer), waits=trains, left=left if trains else None, writing=writing)
        self._ending.listen()

    def _watch(self, trainer: L.Trainer) -> None:
        """Starts the watchdog of this rank; every rank calls it."""
        if self.hang_limit is not None:
            self._watchdog = Watchdog(
                self.hang_limit,
                Path(trainer.default_root_dir),
                trainer.global_rank,
                trainer.world_size,
                step=lambda: trainer.global_step,
                whole=lambda: HEART.whole and can_go_back(trainer),
                save=partial(self._save_hung, trainer),
                left=partial(self._left, trainer),
                forward=_forward(trainer),
            )
            self._watchdog.start()

    def _left(self, trainer: L.Trainer) -> str:
        last = self.last_model_path
        there = trainer.ckpt_path is not None or (exists(last) if is_url(last) else Path(last).is_file())
        return "at the last checkpoint" if there else "before there is a checkpoint: nothing was trained that is kept"

    def _save_hung(self, trainer: L.Trainer) -> str:
        """Writes ``last.ckpt`` in a thread beside the main one, which hangs; every rank calls it.

        Raises:
            RuntimeError: the main thread goes on all the same.
        """
        beats, path = HEART.beats, self.last_model_path
        # ranks hang in different places, but of one step
        loader: Any = trainer.train_dataloader
        unfinished, start = loader.unfinished, loader.go_back()
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
        if unfinished:
            rewind(checkpoint, unfinished)
        checkpoint["rng"] = start.rng
        if trainer.is_global_zero:
            apart = f"{path}.hung"
            trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, apart)
            if HEART.beats != beats:
                trainer.strategy.checkpoint_io.remove_checkpoint(apart)
                raise RuntimeError("it went on meanwhile")
            move(apart, path)
        return path

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._listen(trainer)

    on_test_start = on_predict_start = on_validation_start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._listen(trainer)
        here, root = self.folder(trainer), Path(trainer.default_root_dir)
        self.last_model_path = join(here, LAST)
        if trainer.is_global_zero:
            if trainer.ckpt_path is not None and parent(str(trainer.ckpt_path)) == parent(self.last_model_path):
                forget_samples_after(trainer.global_step, root)
            else:
                begun = [Path(logger.log_dir) for logger in trainer.loggers if logger.log_dir]
                apart: Any = set_aside(root / "checkpoints" if is_url(here) else Path(here), root, begun)
                if apart := (set_checkpoints_aside(here) if is_url(here) else apart):
                    rank_zero_info(f"What an earlier run left in {here} is now in {apart}")
        # nobody writes or reads there before files were moved
        trainer.strategy.barrier("set aside")
        self._watch(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        try:
            _wait(trainer)
        except OSError as error:  # the run ends by what came first
            rank_zero_warn(printable(error))
        self._end()

    def _end(self) -> None:
        self._ending.over()
        HEART.whole = False
        if self._watchdog is not None:
            self._watchdog.over()
            self._watchdog = None
        for lock in self._locks:
            lock.release()
        self._locks = []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        HEART.whole = False

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
        HEART.beat()
        if not _validates(trainer):
            _mark(trainer)
        # every rank asks at every step: a signal to one of them ends all after the same step
        with HEART.waiting():
            ends = trainer.strategy.reduce_boolean_decision(self._ending.number is not None, all=False)
        if ends:
            if self._last_global_step_saved != trainer.global_step:
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            _wait(trainer)
            name = "SIGTERM" if self._ending.number is None else signal.Signals(self._ending.number).name
            rank_zero_info(f"{name}: stopped after optimizer step {trainer.global_step}; go on with --ckpt_path=last")
            if self._ending.number == signal.SIGINT:
                raise KeyboardInterrupt
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and trainer.global_step:
            _mark(trainer)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        # what others save is there when they have saved it
        io: Any = trainer.strategy.checkpoint_io
        if trainer.is_global_zero and isinstance(io, BackgroundIO):
            io.may_follow(filepath)
        super()._save_checkpoint(trainer, filepath)

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        # `--ckpt_path=last` is looked up before setup
        # Lightning lists the folder, and fails on a file that the run which writes there removes meanwhile
        last = join(self.folder(trainer), LAST)
        if not is_url(last):
            restored(Path(last))
        # a link to nothing is told
        there = exists(last) if is_url(last) else Path(last).exists() or Path(last).is_symlink()
        return {last} if there else set()

    def folder(self, trainer: L.Trainer) -> str:
        """Returns the folder of its checkpoints, or its URL."""
        self._settle(trainer)
        return str(self.dirpath)

    def _settle(self, trainer: L.Trainer) -> None:
        self.dirpath = self.dirpath or os.path.join(trainer.default_root_dir, "checkpoints")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.global_step and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        _wait(trainer)
        for last in self._find_last_checkpoints(trainer) if trainer.is_global_zero else ():
            print(printable(f"the last checkpoint is {last}; `opd export {shlex.quote(last)} DIR` writes its model"))


def _wait(trainer: L.Trainer) -> None:
    """Waits for checkpoints that a thread writes."""
    if isinstance(trainer.strategy.checkpoint_io, BackgroundIO):
        with HEART.waiting_for("checkpoint"):
            trainer.strategy.checkpoint_io.wait()


def _mark(trainer: L.Trainer) -> None:
    """Notes that what is now can be saved, until the next update."""
    loader: Any = trainer.train_dataloader
    if hasattr(loader, "mark"):
        loader.mark()
        HEART.whole = True


def _forward(trainer: L.Trainer) -> Callable[[int], None]:
    """Returns what sends a signal to the ranks that this process started."""
    launcher: Any = trainer.strategy.launcher
    return (lambda _: None) if launcher is None else launcher.kill


def _validates(trainer: L.Trainer) -> bool:
    """Tells whether a validation follows upon this batch."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    batches: Any = trainer.num_val_batches
    return (
        trainer.enable_validation and bool(np.sum(batches)) and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
    )
