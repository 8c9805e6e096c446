"""What is in a checkpoint, from wherever it is, and which ones are refused."""

from __future__ import annotations

import errno
from pathlib import Path

import lightning as L
import pytest
import torch

from opd_lightning.checkpoint_file import AtomicIO, check_ours, check_whole, newest_whole
from opd_lightning.cli import run
from opd_lightning.folder import RunLock
from opd_lightning.objective import ForwardKL, Objective, ReverseKL, Term
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout_settings import Rollout
from opd_lightning.teacher import EMA, Frozen, Teacher
from tests.test_resume import PLAIN, configuration
from tests.tiny import LongerIsBetter, Rows, make_trainer

# -- in the middle of an optimizer step ---------------------------------------------------------------------------


class SavesAlways(L.Callback):
    """A checkpoint after every micro-batch, and where the run ends in an exception."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, []

    def _save(self, trainer, name) -> None:
        self.files.append(self.folder / f"{name}.ckpt")
        trainer.save_checkpoint(self.files[-1])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._save(trainer, len(self.files))

    def on_exception(self, trainer, pl_module, exception):
        self._save(trainer, "exception")


def fits(world, folder, callbacks=(), checkpoint=None, breaks=None):
    """Six steps of two micro-batches, two to a generation batch and an epoch, with dropout and a moving teacher."""
    logged = []

    class Watching(world.setting):
        def training_step(self, batch, batch_idx):
            if batch_idx == breaks:
                raise RuntimeError("breaks")
            return super().training_step(batch, batch_idx) * (1 + torch.rand(()))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch.is_last:
                logged.append((self.global_step, self.recorded()))
            super().on_train_batch_end(outputs, batch, batch_idx)

    L.seed_everything(7)
    teachers = {"frozen": Teacher(Frozen(Pretrained(str(world.teacher)))), "moving": Teacher(EMA(0.3))}
    module = world.module(
        teachers,
        Objective([Term(ReverseKL(), teacher="frozen"), Term(ForwardKL(), teacher="moving")]),
        setting=Watching,
        rollout=Rollout(batch_size=8, micro_batch_size=2, horizon=6),
        reward=LongerIsBetter(),
    )
    trainer = make_trainer(folder, 6, accumulate_grad_batches=2, enable_checkpointing=True, callbacks=list(callbacks))
    trainer.fit(module, datamodule=Rows(world.make_rows(16)), ckpt_path=checkpoint, weights_only=True)
    return {name: value.clone() for name, value in module.state_dict().items()}, logged


@pytest.fixture
def text(make_world):
    return make_world("text")


def test_a_checkpoint_from_anywhere_resumes_as_if_nothing_were_lost(text, tmp_path):
    """Weights, averaged teacher, randomness and what is logged."""
    saver = SavesAlways(tmp_path / "saved")
    weights, logged = fits(text, tmp_path, [saver])
    assert len(saver.files) == 12
    for file in saver.files[:8]:
        again, rest = fits(text, tmp_path, checkpoint=file)
        for name, value in weights.items():
            assert torch.equal(again[name], value), f"{name} from {file.name}"
        assert rest == logged[-len(rest) :], file.name


@pytest.mark.parametrize("at", [2, 3])
def test_so_does_one_from_where_the_run_broke(at, text, tmp_path):
    saver = SavesAlways(tmp_path / "saved")
    weights, logged = fits(text, tmp_path)
    with pytest.raises(RuntimeError, match="breaks"):
        fits(text, tmp_path, [saver], breaks=at)
    again, rest = fits(text, tmp_path, checkpoint=tmp_path / "saved" / "exception.ckpt")
    assert len(rest) == 5
    assert rest == logged[-5:]
    for name, value in weights.items():
        assert torch.equal(again[name], value), name


# -- where it can't be written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EROFS, errno.EDQUOT, errno.ENOSPC, errno.EACCES, errno.ESTALE])
def test_what_the_disk_said_is_told_with_what_is_left(number, tmp_path, monkeypatch):
    """Also where nothing can be removed any more."""
    AtomicIO().save_checkpoint({"a": 1}, tmp_path / "step-1.ckpt")

    def fails(self, *_, **__):
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "open", fails)
    monkeypatch.setattr(Path, "unlink", fails)
    with pytest.raises(OSError, match=r"step-2\.ckpt could not be written .*the one before it is whole: .*step-1\."):
        AtomicIO().save_checkpoint({"a": 2}, tmp_path / "step-2.ckpt")


def test_a_folder_that_can_not_be_made_is_told_alike(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OSError, match=r"file/last\.ckpt could not be written"):
        AtomicIO().save_checkpoint({"a": 2}, tmp_path / "file" / "last.ckpt")


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    AtomicIO().save_checkpoint({"a": 2}, tmp_path / "gone" / "last.ckpt")
    assert torch.load(tmp_path / "gone" / "last.ckpt", weights_only=True) == {"a": 2}


# -- which are refused ------------------------------------------------------------------------------------------------


class Odd:
    """What weights_only does not load."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"there is no file or folder .*x\.ckpt; the newest whole one beside it is --ckpt_path=.*good\.ckpt"),
        (b"", r"x\.ckpt is cut short or no checkpoint at all; the newest whole one beside it is"),
        (b"\x80\x04 no zip", r"x\.ckpt is cut short or no checkpoint at all"),
        ({"weight": torch.zeros(2)}, r"x\.ckpt is no checkpoint of `opd fit`, or one of an earlier version"),
        ({"state_dict": {}, "loops": {}}, r"is no checkpoint of `opd fit`, or one of an earlier version"),
        ([1, 2], r"is no checkpoint of `opd fit`"),
        (Odd(), r"is no checkpoint of `opd fit`: Weights only load failed"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_a_sentence(content, message, tmp_path):
    torch.save({"state_dict": {}, "loops": {}, "made_with": {}}, tmp_path / "good.ckpt")
    check_ours(tmp_path / "good.ckpt")
    path = tmp_path / "x.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        check_ours(path)


def test_a_name_that_is_nearly_a_runs_is_answered_by_it(tmp_path):
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(ValueError, match=r"there is no file or folder .*/quikstart; did you mean .*/quickstart\?$"):
        check_whole(tmp_path / "quikstart")


def test_a_runs_folder_is_told_which_checkpoint_it_holds(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    torch.save({}, tmp_path / "checkpoints" / "last.ckpt")
    for folder in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(ValueError, match=r"is a folder; its last checkpoint is .*/checkpoints/last\.ckpt"):
            check_ours(folder)


@pytest.mark.parametrize(
    ("command", "path", "message"),
    [
        ("test", "last", r"--ckpt_path=last: there is no last\.ckpt in .*checkpoints; without --ckpt_path the student"),
        ("validate", "last", r"there is no last\.ckpt in"),
        ("predict", "nowhere.ckpt", r"there is no file or folder nowhere\.ckpt$"),
        ("fit", "nowhere.ckpt", r"there is no file or folder nowhere\.ckpt$"),
        ("fit", "best", r"--ckpt_path=best: only the run itself knows"),
    ],
)
def test_values_of_ckpt_path(command, path, message, make_world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configuration(tmp_path, make_world("text"), PLAIN)
    with pytest.raises(ValueError, match=message):
        run([command, "-c", str(config), f"--ckpt_path={path}"])


def test_a_root_that_is_a_file_is_refused_before_anything_is_loaded(make_world, tmp_path):
    config = configuration(tmp_path, make_world("text"), PLAIN)
    with pytest.raises(OSError, match=r"trainer\.default_root_dir: .*run\.yaml is a file, no folder"):
        run(["fit", "-c", str(config), f"--trainer.default_root_dir={config}"])


def test_last_in_an_empty_folder_starts_anew(make_world, tmp_path):
    config = configuration(tmp_path, make_world("text"), PLAIN)
    run(["fit", "-c", str(config), "--ckpt_path=last", "--trainer.max_steps=1"])
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


@pytest.fixture
def vanishing(monkeypatch):
    """Files of a run that goes on: listed, then gone before Lightning looks at them."""

    def listed(self, path, detail=False, **settings):
        raise FileNotFoundError(f"{path}/step-37.ckpt")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.ls", listed)


@pytest.mark.usefixtures("vanishing")
def test_a_file_that_a_run_removes_meanwhile_stops_nobody_who_reads_its_last(make_world, tmp_path):
    config = configuration(tmp_path, make_world("text"), PLAIN)
    (tmp_path / "checkpoints").mkdir()
    lock = RunLock(tmp_path)
    lock.acquire()
    for how in ([], ["--ckpt_path=last"]):
        with pytest.raises(RuntimeError, match="another run writes into"):
            run(["fit", "-c", str(config), *how])
    lock.release()


def test_a_last_one_that_links_to_nothing_is_told(make_world, tmp_path):
    config = configuration(tmp_path, make_world("text"), PLAIN)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").symlink_to("gone.ckpt")
    with pytest.raises(ValueError, match=r"there is no file or folder .*last\.ckpt"):
        run(["fit", "-c", str(config), "--ckpt_path=last"])


def test_the_newest_whole_one_is_found_beside_what_vanishes(tmp_path, monkeypatch):
    for name in ("step-1.ckpt", "step-2.ckpt"):
        torch.save({}, tmp_path / name)
    stat = Path.stat

    def gone(self, **settings):
        if self.name == "step-2.ckpt":
            raise FileNotFoundError(self)
        return stat(self, **settings)

    monkeypatch.setattr(Path, "stat", gone)
    assert newest_whole(tmp_path) == tmp_path / "step-1.ckpt"
