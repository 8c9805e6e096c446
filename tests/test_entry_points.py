"""Commands and parts that packages register, this one and others."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback

from opd_lightning import entry_points
from opd_lightning.__main__ import execute
from opd_lightning.cli import OPDCLI, understood
from opd_lightning.config_file import ConfigError
from opd_lightning.config_keys import find_class, kinds_of
from opd_lightning.front import overview
from opd_lightning.jsonargparse_internals import import_object

QUICKSTART = ("fit", "-c", "opd:text/quickstart.yaml")


@pytest.fixture
def theirs(tmp_path, monkeypatch) -> Path:
    """Another package, installed, with a command and a part; its command's module says when it is imported."""
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "__init__.py").write_text("print('imported')\n", encoding="utf-8")
    (tmp_path / "their_package" / "tool.py").write_text(
        'def main(arguments):\n    """Greets whoever is named.\n\n    At length.\n    """\n'
        '    print("hello", *arguments)\n',
        encoding="utf-8",
    )
    (tmp_path / "their_package" / "parts.py").write_text(
        "from opd_lightning.reward import Reward\n\nclass EvenLength(Reward):\n"
        "    def __call__(self, completion, example):\n        return 1.0 - len(completion) % 2\n",
        encoding="utf-8",
    )
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[opd_lightning.commands]\nhello = their_package.tool:main\nreport = their_package.tool:main\n\n"
        "[opd_lightning.parts]\ntheirs = their_package.parts\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry_points.registered.cache_clear()
    yield tmp_path
    entry_points.registered.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "their_package"]:
        del sys.modules[name]


def test_another_package_registers_a_command(theirs, capsys):
    assert "\n  hello         greets whoever is named\n" in overview()
    assert capsys.readouterr().out == "", "nothing of it is imported for a list"
    execute(["hello", "you", "--too"])
    assert capsys.readouterr().out == "imported\nhello you --too\n"


def test_a_command_of_this_package_is_not_replaced(theirs):
    assert entry_points.registered(entry_points.COMMANDS)["report"].module == "opd_lightning.report"


def test_another_package_registers_parts_with_short_names(theirs, capsys):
    with pytest.raises(SystemExit) as caught:
        OPDCLI([*QUICKSTART, "--model.reward=EvenLength", "--print_config"])
    assert not caught.value.code
    assert "their_package.parts.EvenLength" in capsys.readouterr().out


def test_parts_of_another_package_that_are_broken_do_no_harm(theirs):
    (theirs / "their_package" / "parts.py").write_text("import no_such_thing\n", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"theirs \(their_package\.parts\) can't be imported: ModuleNotFoundError"):
        entry_points.import_parts()


def test_an_installation_of_before_the_commands_were_says_so(monkeypatch, capsys):
    monkeypatch.setattr(entry_points, "distributions", lambda: [])
    entry_points.registered.cache_clear()
    with pytest.raises(ConfigError, match=r"this installation is older than its code; run `pip install -e \.` again"):
        overview()
    with pytest.raises(SystemExit):
        understood(QUICKSTART)
    assert "has registered no opd_lightning.parts" in capsys.readouterr().err
    entry_points.registered.cache_clear()


def test_what_an_early_installation_left_in_the_folder_hides_nothing(tmp_path, monkeypatch):
    left = tmp_path / "opd_lightning.egg-info"
    left.mkdir()
    (left / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: opd-lightning\nVersion: 0.0.1\n", encoding="utf-8")
    (left / "entry_points.txt").write_text("[console_scripts]\nopd = opd_lightning.__main__:main\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    entry_points.registered.cache_clear()
    assert "report" in entry_points.commands()
    entry_points.registered.cache_clear()


def test_a_command_without_a_docstring_or_a_file_has_no_summary():
    assert entry_points.summary(EntryPoint("a", "no_such_package.tool:main", "")) == ""
    assert entry_points.summary(EntryPoint("a", "opd_lightning.report:no_such_function", "")) == ""


def test_every_registered_command_says_what_it_does():
    assert all(entry_points.commands().values())


def kinds_that_ship() -> list[type]:
    """Every class of this package, and Lightning's callback: what others may be kinds of."""
    entry_points.import_parts()
    modules = [vars(module) for name, module in sys.modules.items() if name.startswith("opd_lightning.")]
    classes = {value for names in modules for value in names.values() if isinstance(value, type)}
    return [cls for cls in classes if cls.__module__.startswith("opd_lightning.")] + [Callback]


def test_every_class_that_ships_has_a_short_name_of_its_own():
    named = {}
    for kind in kinds_that_ship():
        for name, path in kinds_of(kind).items():
            if path.startswith("opd_lightning."):
                assert find_class(name, kind) is import_object(path)
                named[path] = name
    assert {"ReverseKL", "Entropy", "Euler", "VelocityMatching", "Spotlight", "Crop", "Frozen", "ExactMatch"} <= {
        *named.values()
    }
    assert {"VllmServer", "FirstSteps", "Linear", "PromptView", "ToolCall", "CollapseAlarm"} <= {*named.values()}
    whole = {path for path, name in named.items() if "." in name}
    assert whole <= {"opd_lightning.checkpoint.Checkpoint"}, "which Lightning has, too, and nobody names: it is there"
