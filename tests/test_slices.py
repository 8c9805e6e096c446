"""Checkpoints in slices: they hold what one file holds, in one process here; with several in test_ranks.py."""

from __future__ import annotations

import pickle
import shutil

import pytest
import torch

from opd_lightning.checkpoint_file import check_ours, is_slices, newest_whole
from opd_lightning.cli import run
from opd_lightning.export import write
from opd_lightning.slices import OLD, convert, read_slices, restored
from tests.processes import last
from tests.test_resume import EMA, configuration


@pytest.fixture(scope="module")
def made(make_world, tmp_path_factory):
    config = configuration(tmp_path_factory.mktemp("made"), make_world("text"), EMA)
    run(["fit", "-c", str(config), "--trainer.max_steps=3"])
    return config


def assert_equal(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}.{i}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other or one != one, where


def test_conversion_there_and_back_loses_nothing_and_either_form_resumes_and_exports(made, tmp_path):
    checkpoint = made.parent / "checkpoints" / "last.ckpt"
    convert([str(checkpoint), str(tmp_path / "slices.ckpt")])
    assert is_slices(tmp_path / "slices.ckpt")
    check_ours(tmp_path / "slices.ckpt")
    convert([str(tmp_path / "slices.ckpt"), str(tmp_path / "file.ckpt")])
    assert_equal(torch.load(tmp_path / "file.ckpt", weights_only=True), last(made))

    shutil.copytree(made.parent, tmp_path / "run")
    again = ["fit", "-c", str(made), f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.max_steps=5"]
    run([*again, f"--ckpt_path={tmp_path / 'slices.ckpt'}"])
    from_slices = last(tmp_path / "run" / "run.yaml")["state_dict"]
    run([*again, f"--ckpt_path={tmp_path / 'file.ckpt'}"])
    assert_equal(last(tmp_path / "run" / "run.yaml")["state_dict"], from_slices)
    write(tmp_path / "slices.ckpt", tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_what_is_no_whole_folder_of_slices_is_refused(made, tmp_path):
    folder = tmp_path / "run" / "step-3.ckpt"
    convert([str(made.parent / "checkpoints" / "last.ckpt"), str(folder)])
    with pytest.raises(FileExistsError, match="is there already"):
        convert([str(made.parent / "checkpoints" / "last.ckpt"), str(folder)])
    assert newest_whole(folder.parent) == folder
    (folder / "rest.pt").rename(tmp_path / "rest.pt")
    assert newest_whole(folder.parent) is None
    with pytest.raises(ValueError, match="no checkpoint, or one in slices that is not whole"):
        check_ours(folder)


def test_an_index_that_would_run_something_is_refused(made, tmp_path):
    convert([str(made.parent / "checkpoints" / "last.ckpt"), str(tmp_path / "evil.ckpt")])
    (tmp_path / "evil.ckpt" / ".metadata").write_bytes(pickle.dumps(shutil.rmtree))
    with pytest.raises(ValueError, match=r"something else than tensors: its index names shutil\.rmtree"):
        read_slices(tmp_path / "evil.ckpt")


def test_a_kill_between_two_renames_is_undone(tmp_path):
    old = tmp_path / f"last.ckpt{OLD}"
    old.mkdir()
    restored(tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").is_dir()
    assert not old.exists()
