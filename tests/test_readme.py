"""What the README shows is what works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opd_lightning.cli import run
from opd_lightning.shipped import shipped

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


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
