"""Checkpoints and data elsewhere, by fsspec's in-memory file system; what needs a folder of this machine says so."""

from __future__ import annotations

import fsspec
import pytest
import torch

from opd_lightning.checkpoint_file import check_whole
from opd_lightning.cli import run
from opd_lightning.export import write
from opd_lightning.remote import join, kept_copy, parent
from tests.processes import last
from tests.test_resume import EMA, configuration


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def put(files, path, url: str) -> None:
    files.pipe_file(url, path.read_bytes())


def test_a_run_trains_resumes_and_exports_from_elsewhere(memory, make_world, tmp_path):
    """As one does whose files are here, bit for bit."""
    config = configuration(tmp_path / "here", make_world("text"), EMA)
    run(["fit", "-c", str(config), "--trainer.max_steps=4"])
    expected = last(config)["state_dict"]

    config = configuration(tmp_path / "away", make_world("text"), EMA)
    put(memory, config.parent / "data" / "rows.jsonl", "memory://data/rows.jsonl")
    away = ["--data.train=memory://data/rows.jsonl", "--checkpoint.dirpath=memory://run/checkpoints"]
    fit = ["fit", "-c", str(config), *away, "--model.schedule.name=cosine"]
    run([*fit, "--trainer.max_steps=4"])
    assert sorted(memory.ls("/run/checkpoints", detail=False)) == [
        "/run/checkpoints/last.ckpt",
        "/run/checkpoints/step-4.ckpt",
    ]
    assert not list((tmp_path / "away").rglob("*.ckpt"))
    with memory.open("/run/checkpoints/last.ckpt", "rb") as file:
        found = torch.load(file, weights_only=True)["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    run([*fit, "--trainer.max_steps=5", "--ckpt_path=last"])
    run([*fit, "--trainer.max_steps=6", "--ckpt_path=memory://run/checkpoints/step-5.ckpt"])
    with memory.open("/run/checkpoints/last.ckpt", "rb") as file:
        assert torch.load(file, weights_only=True)["global_step"] == 6
    assert not memory.exists("/run/checkpoints/earlier-1")
    write("memory://run/checkpoints/last.ckpt", tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").is_file()

    run([*fit, "--trainer.max_steps=1"])  # a new run in the folder of the last one
    assert sorted(memory.ls("/run/checkpoints/earlier-1", detail=False)) == [
        "/run/checkpoints/earlier-1/last.ckpt",
        "/run/checkpoints/earlier-1/step-6.ckpt",
    ]


def test_what_is_cut_short_or_missing_elsewhere_is_refused(memory):
    memory.pipe_file("memory://run/last.ckpt", b"PK half of it")
    with pytest.raises(ValueError, match=r"memory://run/last\.ckpt is cut short or no checkpoint at all"):
        check_whole("memory://run/last.ckpt")
    with pytest.raises(ValueError, match=r"there is no file memory://run/other\.ckpt"):
        check_whole("memory://run/other.ckpt")
    with pytest.raises(ValueError, match=r"nowhere://x\.ckpt: Protocol not known"):
        check_whole("nowhere://x.ckpt")


def test_what_needs_a_folder_of_this_machine_says_so(memory, make_world, tmp_path):
    config = configuration(tmp_path, make_world("text"), EMA)
    root = "--trainer.default_root_dir=memory://run"
    with pytest.raises(ValueError, match=r"default_root_dir: memory://run is no folder of this.*dirpath may be"):
        run(["fit", "-c", str(config), root])
    with pytest.raises(ValueError, match=r"data\.train: memory://data/rows\.jsonl is not there"):
        run(["fit", "-c", str(config), "--data.train=memory://data/rows.jsonl"])
    with pytest.raises(FileNotFoundError, match=r"there is no folder memory://a/b;.*are read from this machine"):
        run(["fit", "-c", str(config), "--model.student.path=memory://a/b"])


def test_copies_follow_the_file(memory, tmp_path):
    memory.pipe_file("memory://data/rows.jsonl", b"1")
    first = kept_copy("memory://data/rows.jsonl", tmp_path)
    assert kept_copy("memory://data/rows.jsonl", tmp_path) == first
    memory.pipe_file("memory://data/rows.jsonl", b"2")
    second = kept_copy("memory://data/rows.jsonl", tmp_path)
    assert (first.read_bytes(), second.read_bytes(), second.name) == (b"1", b"2", "rows.jsonl")
    with pytest.raises(ValueError, match="memory://data is a folder: name one file of it"):
        kept_copy("memory://data", tmp_path)


def test_paths_of_both_kinds(tmp_path):
    assert join("s3://a/b/", "c") == "s3://a/b/c"
    assert parent("s3://a/b/c") == "s3://a/b"
    assert join(str(tmp_path), "c") == str(tmp_path / "c")
    assert parent(str(tmp_path / "x" / ".." / "c")) == str(tmp_path.resolve())
