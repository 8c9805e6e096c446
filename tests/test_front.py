"""What `opd` answers before it imports a library: help, the version, wrong commands, files and keys at the top."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields

import pytest
from jsonargparse import Namespace

from opd_lightning.__main__ import execute
from opd_lightning.cli import OPDCLI, understood
from opd_lightning.command_help import help_of
from opd_lightning.config_file import ConfigError
from opd_lightning.endpoint import Budget, Endpoint
from opd_lightning.entry_points import COMMANDS, commands, file_of, registered
from opd_lightning.front import RUNS, front, keys_of


def answer(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        front(arguments)
    assert not caught.value.code
    return capsys.readouterr().out


OWN = ("export", "gallery", "methods", "render-gui", "report", "table")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_names_every_command(capsys, arguments):
    text = answer(capsys, *arguments)
    assert all(re.search(rf"^  {command} +\w+", text, re.MULTILINE) for command in (*RUNS, *OWN))


@pytest.mark.parametrize("command", OWN)
def test_a_command_that_is_registered_has_a_help_of_its_own(capsys, command):
    with pytest.raises(SystemExit) as caught:
        execute([command, "--help"])
    assert not caught.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: opd {command} ")
    assert commands()[command].split()[-1] in text


@pytest.mark.parametrize("command", sorted(commands()))
def test_help_that_imports_nothing_names_what_the_parser_of_a_command_takes(command):
    """Help is read from the command's file; the few that compute it give it themselves."""
    entry = registered(COMMANDS)[command]
    page, file = help_of(entry), file_of(entry.module)
    assert (page is None) == (command in ("fetch", "new"))
    flags = set(re.findall(r'add_argument\(\s*"(--\w+)"', file.read_text(encoding="utf-8")))
    assert page is None or all(flag in page for flag in flags)


def test_help_says_defaults(capsys):
    text = answer(capsys, "serve", "--help")
    assert "default: 127.0.0.1)" in text
    assert "OPD_SERVE_TOKEN" in text, "a constant of the module"
    assert "(default: true)" in answer(capsys, "export", "-h")


def test_help_has_the_fields_of_a_dataclass_that_a_command_takes(capsys):
    text = " ".join(answer(capsys, "ask", "--help").split())
    assert "--endpoint.url str such as ``http://localhost:8000``" in text
    assert "--endpoint.at_once int requests in flight" in text
    assert "--endpoint.budget.money float | None in the currency of the prices. Default: no limit." in text
    known = {f"--endpoint.{field.name}" for field in fields(Endpoint)} - {"--endpoint.budget"}
    assert all(flag in text for flag in known | {f"--endpoint.budget.{field.name}" for field in fields(Budget)})


@pytest.mark.parametrize("command", ["gallery", "report", "table"])
def test_a_folder_without_a_run_is_named(command, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"{tmp_path} holds no run of `opd fit` that began: there is no .*config\.yaml"
    ):
        execute([command, str(tmp_path)])


def test_the_version_names_the_libraries_too(capsys):
    text = answer(capsys, "--version")
    assert text.startswith("opd-lightning ")
    assert "torch " in text
    assert "transformers " in text


@pytest.mark.parametrize("command", RUNS)
def test_help_of_a_command_names_its_keys(capsys, command):
    text = answer(capsys, command, "-c", "nowhere.yaml", "--help")
    assert RUNS[command].capitalize() in text
    assert all(f"--{key} " in text for key in (*keys_of(command), "print_config", "traceback", "KEY.help"))


def test_the_keys_are_those_that_the_parser_takes(monkeypatch):
    parsers = {}
    monkeypatch.setattr(OPDCLI, "parse_arguments", lambda self, *_: parsers.update(self._subcommand_parsers))
    monkeypatch.setattr(OPDCLI, "_parse_ckpt_path", lambda self: setattr(self, "config", Namespace(subcommand=None)))
    monkeypatch.setattr(OPDCLI, "_set_seed", lambda self: None)
    monkeypatch.setattr(OPDCLI, "instantiate_classes", lambda self: None)
    for command in RUNS:
        OPDCLI([command])  # which builds the parser of this one alone
        assert list(parsers)[-1] == command
        known = {action.dest.split(".")[0] for action in parsers[command]._actions}
        assert known - {"help", "config", "print_config"} == set(keys_of(command)), command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], r"there is no command 'fitt'; did you mean fit\?"),
        (["-c", "x.yaml", "fit"], r"there is no command '-c'"),
        (["fit", "-c", "nope.yaml"], r"nope\.yaml: No such file"),
        (["fit", "--modl.x=1"], r"modl: opd fit has no such key; did you mean model\?"),
        (["fit", "--verbose=true"], r"verbose: opd fit has no such key"),
        (["fit", "mine.yaml"], r"mine\.yaml: what is this\? Files are given as `-c FILE`"),
    ],
)
def test_what_is_wrong_at_the_top_is_said_at_once(arguments, message):
    with pytest.raises(ConfigError, match=message):
        front(arguments)


def test_none_of_it_imports_a_library():
    script = (
        "import sys\nfrom opd_lightning.front import front\n"
        "for arguments in (['-h'], ['--version'], ['report', 'x'], ['no-command'], ['export', '-h'], ['serve', '-h'], "
        "['fit', '--help'], ['fit', '-c', 'nope.yaml'], ['fit', '--x=1']):\n"
        "    try:\n        front(arguments)\n    except (SystemExit, ValueError):\n        pass\n"
        "print(sorted({'torch', 'lightning', 'transformers', 'datasets', 'diffusers', 'peft'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--model.evaluation.help"], ["model.evaluation: Evaluation", "temperature: float = 0.0", "pass@k"]),
        (["--model.help"], ["kinds of OnPolicyDistillation", "TextDistillation"]),
        (["--model.help", "TextDistillation"], ["raw_prompts: bool = False", "student: Pretrained"]),
        (["--model.help=DiffusionDistillation"], ["DiffusionDistillation", "sampler"]),
        (["--model.teachers.any.weights.help"], ["kinds of TeacherWeights", "EMA", "Frozen"]),
        (["--model.objective.terms.signal.help", "JSD"], ["JSD", "beta: float"]),
        (["--model.optimizer.help", "torch.optim.SGD"], ["SGD", "momentum"]),
        (["--trainer.help"], ["Trainer", "max_steps"]),
        (["--model.rollout.horizon.help"], ["rollout.horizon: int", "steps after which a rollout ends"]),
        (["--model.rollout.top_p.help"], ["rollout.top_p: float", "filters, off by default"]),
        (["-c", "opd:text/quickstart.yaml", "--data.columns.help"], ["columns: dict[str, str]", "canonical column"]),
        (["--trainer.max_steps.help"], ["max_steps: int", "Stop training after"]),
        (["--seed_everything.help"], ["bool | int", "decides everything that is drawn"]),
        (["--trainer.callbacks.help"], ["CollapseAlarm", "Curriculum"]),
        (["--checkpoint.help"], ["every_n_train_steps"]),
        (["--model.rollout.horizon.help"], ["model.rollout.horizon: int"]),
        (["-c", "opd:text/quickstart.yaml", "--model.reward.help"], ["model.reward: ExactMatch", "after"]),
        (["-c", "opd:text/quickstart.yaml", "--model.evaluation.help"], ["model.evaluation: Evaluation"]),
        (["-c", "opd:diffusion/quickstart.yaml", "--model.sampler.help"], ["kinds of Sampler", "Shortcuts"]),
    ],
)
def test_every_key_has_a_help(capsys, arguments, texts):
    with pytest.raises(SystemExit) as caught:
        understood(["fit", *arguments])
    found = capsys.readouterr()
    assert not caught.value.code, found.err
    assert all(text in found.out for text in texts), found.out


def names_in_help(capsys, key: str) -> list[str]:
    """The names that a key's help lists."""
    with pytest.raises(SystemExit):
        understood(["fit", f"--{key}.help"])
    return re.findall(r"^  ([\w.]+) ", capsys.readouterr().out.partition("kinds of ")[2], re.MULTILINE)


def test_help_lists_the_callbacks_of_this_package_before_the_libraries(capsys):
    names = names_in_help(capsys, "trainer.callbacks")
    assert {"CollapseAlarm", "Curriculum", "TeacherSync"} <= set(names[: names.index("EarlyStopping")])


def test_help_lists_no_name_twice(capsys):
    names = names_in_help(capsys, "model.optimizer")
    assert len(names) == len(set(names))
    assert {"torch.optim.AdamW", "bitsandbytes.optim.AdamW", "Adamax"} <= set(names), "two have the name AdamW"


def test_help_of_a_key_that_is_none(capsys):
    with pytest.raises(SystemExit) as caught:
        understood(["fit", "--model.evaluatoin.help"])
    assert caught.value.code == 2
    assert "model.evaluatoin: no such key; did you mean evaluation?" in capsys.readouterr().err
