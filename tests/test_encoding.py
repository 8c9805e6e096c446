"""UTF-8 wherever text is read or written, whatever the machine's own encoding is; and clones without symbolic links."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_resume import PLAIN, configuration

ROOT = Path(__file__).parents[1]
OTHERS = (
    "Image.open",
    "os.open",
    "browser.open",
    "student.open",
    "opener.open",
    "accumulator.open",
    "accumulator().open",
    "distribution('miniwob').read_text",
)


def text_without_encoding(source: str) -> list[int]:
    """Lines that open, read or write a text file in the machine's encoding. (ruff sees those whose types it knows.)"""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        if name.rpartition(".")[2] not in ("open", "read_text", "write_text") or name.endswith(OTHERS):
            continue
        binary = any(isinstance(a, ast.Constant) and a.value in ("rb", "wb", "ab") for a in call.args)
        if not binary and "encoding" not in {keyword.arg for keyword in call.keywords}:
            found.append(call.lineno)
    return found


@pytest.mark.parametrize(
    "folder", ["opd_lightning", "modalities", "callbacks", "methods", "benchmarks", "assets", "tests"]
)
def test_every_text_file_names_its_encoding(folder):
    sources = list((ROOT / folder).rglob("*.py"))
    assert sources
    found = {str(path): lines for path in sources if (lines := text_without_encoding(path.read_text(encoding="utf-8")))}
    assert not found


def test_the_check_sees_what_it_is_for():
    assert text_without_encoding("path.open('w')\npath.read_text()\nopen(p, 'rb')\nopen(p, encoding='utf-8')") == [1, 2]


@pytest.mark.parametrize("left", ["text file", "nothing"])
def test_a_clone_without_symbolic_links_says_so(tmp_path, left):
    package = tmp_path / "opd_lightning"
    package.mkdir()
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / "opd_lightning" / name, package)
    for name in ("assets", "configs", "methods", "modalities"):
        (package / name).symlink_to(ROOT / name)
    if left == "text file":
        (package / "callbacks").write_text("../callbacks", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "opd_lightning", "--help"], cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 1
    assert "callbacks should be a symbolic link" in done.stderr
    assert "core.symlinks=true" in done.stderr


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
BOTH = """
import sys
from opd_lightning.__main__ import main

run, folder = sys.argv[1:]
sys.argv = ["opd", "fit", "-c", run]
main()
sys.argv = ["opd", "export", f"{folder}/checkpoints/last.ckpt", f"{folder}/größer"]
main()
"""


@pytest.mark.slow
def test_a_run_and_its_export_where_the_locale_is_ascii(tmp_path, make_world):
    """A teacher, columns of the log, answers and paths beyond ASCII; the progress bar; what the card says."""
    path = configuration(tmp_path / "lauf-ü", make_world("text"), PLAIN)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["trainer"] |= {"max_steps": 1, "enable_progress_bar": True, "limit_val_batches": 1, "val_check_interval": 1}
    config["trainer"]["logger"] = {"class_path": "CSVLogger", "init_args": {"save_dir": str(path.parent), "name": "λ"}}
    model = config["model"]["init_args"]
    model["teachers"] = {"größer": model["teachers"]["teacher"]}
    model["objective"]["terms"][0] |= {"teacher": "größer", "name": "σ"}
    config["data"]["init_args"]["validation"] = config["data"]["init_args"]["train"]
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    (tmp_path / "both.py").write_text(BOTH, encoding="utf-8")
    environment = {**os.environ, **ASCII, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONIOENCODING", None)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "both.py"), str(path), str(path.parent)],
        env=environment, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (table,) = path.parent.glob("λ/version_*/metrics.csv")
    assert "σ" in table.read_text(encoding="utf-8").splitlines()[0]
    assert "größer" in (path.parent / "config.yaml").read_text(encoding="utf-8")
    assert "größer" in (path.parent / "größer" / "README.md").read_text(encoding="utf-8")
