"""What the README shows is what works."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from opd_lightning.cli import run
from opd_lightning.shipped import shipped

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOUSE = ("opd_lightning", "modalities", "callbacks", "methods")
SMALL = [
    "--trainer.max_steps=2",
    "--trainer.logger=false",
    "--trainer.limit_val_batches=0",
    "--model.evaluation.before=false",
    "--model.rollout.batch_size=4",
    "--data.train_options.count=64",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_first_screen_installs_and_runs(tmp_path, monkeypatch):
    """Its commands as they stand there, but that runs are cut to two steps and that nothing is installed."""
    (screen,) = blocks("sh")
    assert README.index(screen) < 1200
    commands = [shlex.split(line, comments=True) for line in screen.splitlines()]
    assert [command[0] for command in commands] == ["make", "pip", "opd", "opd"]
    subprocess.run(["make", "--dry-run", *commands[0][1:]], cwd=ROOT, check=True, capture_output=True)
    assert commands[1] == ["pip", "install", "-c", "constraints.txt", "."]
    assert (ROOT / "constraints.txt").exists()
    for i, (_, *arguments) in enumerate(commands[2:]):
        folder = tmp_path / str(i)
        folder.mkdir()
        monkeypatch.chdir(folder)
        run([*arguments, *SMALL])
        assert list(folder.rglob("last.ckpt"))


def test_the_tree_is_the_one_that_is_tracked():
    """Every file of the package with a clause, and no other; a folder's line is that of its ``__init__.py``."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone: nothing says which files are tracked")
    (tree,) = re.findall(r"<summary>the tree</summary>\n\n```\n(.*?)```", README, re.DOTALL)
    listed: dict[str, str] = {}
    folders: list[str] = []
    for line in filter(None, tree.splitlines()):
        name, clause = re.fullmatch(r" *(\S+) *(.*)", line).groups()
        folders = folders[: (len(line) - len(line.lstrip())) // 4]
        path = "".join([*folders, name])
        assert path not in listed, f"README.md has two lines for {path}"
        assert clause, f"README.md's tree: {path} has no clause"
        listed[f"{path}__init__.py" if name.endswith("/") else path] = clause
        folders += [name] if name.endswith("/") else []
    tracked = subprocess.run(
        ["git", "ls-files", *HOUSE], cwd=ROOT, check=True, capture_output=True, text=True, encoding="utf-8"
    ).stdout
    files = {name for name in tracked.splitlines() if name.endswith(".py") and (ROOT / name).is_file()}
    missing = [
        f"{'    ' * name.count('/') + Path(name).name:<36}{summary(name)}    (below {Path(name).parent}/)"
        for name in files - set(listed)
    ]
    assert not missing, "README.md, ## The house: add to the tree\n" + "\n".join(sorted(missing))
    gone = sorted(set(listed) - files)
    assert not gone, f"README.md, ## The house: take out of the tree what is no tracked file: {', '.join(gone)}"


def test_the_changelog_knows_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[([\d.]+)\] - (?:unreleased|\d{4}-\d\d-\d\d)$", changes, re.MULTILINE)[0] == version


def summary(name: str) -> str:
    """The first line of a file's docstring: what its clause may be made of."""
    return (ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8"))) or "?").partition("\n")[0]


def test_the_python_example_runs(tmp_path, monkeypatch):
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "readme"})


def test_the_yaml_example_overlays_the_quickstart(tmp_path, capsys):
    (overlay,) = blocks("yaml")
    path = tmp_path / "overlay.yaml"
    path.write_text(overlay, encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        run(["fit", "-c", "opd:text/quickstart.yaml", "-c", str(path), "--print_config"])
    assert caught.value.code == 0
    assert "opd_lightning.objective.Outcome" in capsys.readouterr().out


def test_every_file_that_it_names_exists():
    for name in re.findall(r"opd:[\w/]+(?:\.yaml|/\w+)", README):
        shipped(name)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target


def test_every_part_that_it_lists_can_be_named():
    from opd_lightning import callbacks, objective, reward, teacher
    from opd_lightning.modalities import autoregressive, diffusion, gui_grounding, vision_language

    listed = re.findall(r"`([A-Z]\w+)`", README.partition("## The parts")[2].partition("A divergence is named")[0])
    homes = (objective, reward, teacher, autoregressive, gui_grounding, vision_language, diffusion)
    for name in listed:
        assert any(hasattr(module, name) for module in homes), name
    listed = re.findall(r"`([A-Z]\w+)`", README.partition("## Callbacks")[2].partition("## Loggers")[0])
    assert set(listed) <= set(callbacks.__all__)
