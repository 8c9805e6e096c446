"""Checkpoints that a thread writes: what is in them, in which order, and what becomes of an error."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import lightning as L
import pytest
import torch

from opd_lightning import ending
from opd_lightning.background_io import COPIES, BackgroundIO
from opd_lightning.checkpoint import Checkpoint
from opd_lightning.checkpoint_file import AtomicIO
from tests.tiny import make_trainer


@pytest.fixture
def gate(monkeypatch):
    """Nothing is written before it is set."""
    opened, save = threading.Event(), AtomicIO.save_checkpoint

    def slowly(self, *arguments):
        assert opened.wait(60)
        save(self, *arguments)

    monkeypatch.setattr(AtomicIO, "save_checkpoint", slowly)
    yield opened
    opened.set()


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_a_checkpoint_holds_what_was_when_it_was_asked_for(gate, tmp_path):
    io, path = BackgroundIO(), tmp_path / "a.ckpt"
    weight, counts = torch.ones(3), [1]
    io.may_follow(str(path))
    io.save_checkpoint({"weight": weight, "tied": weight, "loops": {"counts": counts}}, path)
    weight.mul_(2)
    counts.append(2)
    assert not path.exists(), "it is not waited for"
    gate.set()
    io.wait()
    found = read(path)
    assert torch.equal(found["weight"], torch.ones(3))
    assert found["weight"].data_ptr() == found["tied"].data_ptr()
    assert found["loops"] == {"counts": [1]}


def test_no_more_copies_than_said_and_what_is_removed_was_there(gate, tmp_path):
    io, paths, done = BackgroundIO(), [tmp_path / f"{i}.ckpt" for i in range(COPIES + 1)], threading.Event()

    def saves() -> None:
        for i, path in enumerate(paths):
            io.may_follow(str(path))
            io.save_checkpoint({"number": i}, path)
        done.set()

    thread = threading.Thread(target=saves)
    thread.start()
    assert not done.wait(0.3), "the third one waits for the first"
    gate.set()
    thread.join()
    io.remove_checkpoint(paths[-1])
    assert io.load_checkpoint(paths[0]) == {"number": 0}
    assert [path.exists() for path in paths] == [True] * COPIES + [False]


def test_an_error_of_the_thread_is_raised_by_who_comes_next_and_nothing_was_removed(tmp_path):
    io, before = BackgroundIO(), tmp_path / "before.ckpt"
    (tmp_path / "file").write_text("", encoding="utf-8")
    io.save_checkpoint({}, before)
    assert before.exists(), "outside it is waited for"
    path = tmp_path / "file" / "a.ckpt"
    io.may_follow(str(path))
    io.save_checkpoint({}, path)
    io.remove_checkpoint(before)
    with pytest.raises(OSError, match=r"a\.ckpt could not be written"):
        io.wait()
    io.wait()
    assert before.exists()
    io.may_follow(str(tmp_path / "a.ckpt"))
    io.save_checkpoint({}, tmp_path / "a.ckpt")
    io.teardown()
    assert read(tmp_path / "a.ckpt") == {}


def test_a_run_writes_the_same_either_way(make_world, tmp_path):
    world, found = make_world("text"), []
    for asynchronous in (False, True):
        L.seed_everything(3)
        saver = Checkpoint(every_n_train_steps=1, asynchronous=asynchronous)
        folder = tmp_path / str(asynchronous)
        trainer = world.fit(world.module(), folder, steps=4, callbacks=[saver], enable_checkpointing=True)
        assert isinstance(trainer.strategy.checkpoint_io, BackgroundIO) == asynchronous
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["last.ckpt", "step-4.ckpt"]
        found.append(read(folder / "checkpoints" / "last.ckpt"))
    torch.testing.assert_close(found[0]["state_dict"], found[1]["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(found[0]["optimizer_states"], found[1]["optimizer_states"], rtol=0, atol=0)


def test_a_run_whose_last_checkpoint_could_not_be_written_does_not_end_well(make_world, tmp_path, monkeypatch):
    world, save = make_world("text"), AtomicIO.save_checkpoint

    def fails(self, checkpoint, path, *rest):
        if checkpoint["global_step"] == 3:
            raise OSError("the disk is full")
        save(self, checkpoint, path, *rest)

    monkeypatch.setattr(AtomicIO, "save_checkpoint", fails)
    saver = Checkpoint(every_n_train_steps=1, asynchronous=True)
    with pytest.raises(OSError, match="the disk is full"):
        world.fit(world.module(), tmp_path, steps=3, callbacks=[saver], enable_checkpointing=True)
    assert read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2
    assert read(tmp_path / "checkpoints" / "step-2.ckpt")["global_step"] == 2, "nothing took its place"


class Saves(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.path)
        assert read(self.path)["global_step"] == trainer.global_step


def test_what_others_save_is_there_when_they_have_saved_it(make_world, tmp_path):
    world, saver = make_world("text"), Checkpoint(every_n_train_steps=1, asynchronous=True)
    callbacks = [saver, Saves(tmp_path / "own.ckpt")]
    trainer = world.fit(world.module(), tmp_path, steps=2, callbacks=callbacks, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert read(tmp_path / "after.ckpt")["global_step"] == 2


def test_a_signal_waits_for_a_write_that_takes_longer_than_a_step(make_world, tmp_path, monkeypatch):
    world, save = make_world("text"), AtomicIO.save_checkpoint
    monkeypatch.setattr(ending, "PATIENCE", 0.1)

    def slowly(self, checkpoint, path, *rest):
        time.sleep(2.0)
        save(self, checkpoint, path, *rest)

    class Asks(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(AtomicIO, "save_checkpoint", slowly)
    saver = Checkpoint(every_n_train_steps=2, asynchronous=True, save_top_k=0)
    world.fit(world.module(), tmp_path, steps=50, callbacks=[Asks(), saver], enable_checkpointing=True)
    assert read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_slices_are_written_together(make_world, tmp_path):
    trainer = make_trainer(tmp_path, 1, strategy="fsdp2_slices", devices=2, enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"checkpoint\.asynchronous: ranks write slices together"):
        Checkpoint(asynchronous=True).setup(trainer, make_world("text").module(), "fit")
