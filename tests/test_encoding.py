"""UTF-8 wherever text is read or written, whatever the machine's own encoding is; and clones without symbolic links."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OTHERS = ("Image.open(", "browser.open(", "student.open(", "importlib.metadata")  # no text files of ours


def text_without_encoding(source: str) -> list[int]:
    """Lines that open, read or write a text file in the machine's encoding. (ruff sees those whose types it knows.)"""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        if name.rpartition(".")[2] not in ("open", "read_text", "write_text") or f"{name}(".startswith(OTHERS):
            continue
        binary = any(isinstance(a, ast.Constant) and a.value in ("rb", "wb", "ab") for a in call.args)
        if not binary and "encoding" not in {keyword.arg for keyword in call.keywords}:
            found.append(call.lineno)
    return found


@pytest.mark.parametrize("folder", ["opd_lightning", "modalities", "callbacks", "benchmarks", "assets"])
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
    for name in ("assets", "configs", "modalities"):
        (package / name).symlink_to(ROOT / name)
    if left == "text file":
        (package / "callbacks").write_text("../callbacks", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "opd_lightning", "--help"], cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 1
    assert "callbacks should be a symbolic link" in done.stderr
    assert "core.symlinks=true" in done.stderr
