"""Values of the command line: text stays text where text is taken, whatever YAML makes of it."""

from __future__ import annotations

import json

import pytest
import yaml

from opd_lightning.cli import OPDCLI, understood

TEACHER = "--model.init_args.teachers.teacher"
OVERLAY = ("fit", "-c", "opd:text/quickstart.yaml", "-c", "opd:methods/text/opsd.yaml")
PROMPTS = ["# {{ prompt }}", "a: b", "Question: {{ prompt }}", "on", "1e3", "null", "~", "- x", "&a", "*b* {{ a }}",
           "{a", "[1, 2]", '{"a": 1}', "%x", "'quoted'", "yes", "0x10", "2024-01-01", "!x", "| x", "", "1_000", "a=b",
           "Größe", "line\n# line", "true", "12"]  # fmt: skip


def said_last(*arguments: str) -> dict:
    return json.loads(understood([*OVERLAY, *arguments])[-1])


@pytest.mark.parametrize("text", PROMPTS)
def test_text_stays_text(text):
    teachers = said_last(f"{TEACHER}.view.init_args.prompt={text}")["model"]["init_args"]["teachers"]
    assert teachers["teacher"]["view"]["init_args"]["prompt"] == text


@pytest.mark.parametrize("text", ["# {{ prompt }}", "1e3", "a: b", "Größe", "null"])
def test_what_is_printed_is_what_was_said(text, capsys):
    with pytest.raises(SystemExit):
        OPDCLI([*OVERLAY, f"{TEACHER}.view.init_args.prompt={text}", "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["teachers"]["teacher"]["view"]["init_args"]
    assert found["prompt"] == text


@pytest.mark.parametrize(
    ("argument", "path", "value"),
    [
        ("--trainer.max_steps=3", ("trainer", "max_steps"), 3),
        ("--trainer.gradient_clip_val=1e-1", ("trainer", "gradient_clip_val"), 0.1),
        ("--trainer.logger=false", ("trainer", "logger"), False),
        ("--trainer.devices=2", ("trainer", "devices"), 2),
        ("--trainer.devices=auto", ("trainer", "devices"), "auto"),
        ("--trainer.precision=16", ("trainer", "precision"), "16"),
        ("--trainer.default_root_dir=runs/a: b", ("trainer", "default_root_dir"), "runs/a: b"),
        ("--ckpt_path=null", ("ckpt_path",), None),
        ("--ckpt_path=1e3", ("ckpt_path",), "1e3"),
        ("--model.rollout.behavior={student: 0.5, dataset: 0.5}", ("model", "init_args", "rollout", "behavior"),
         {"student": 0.5, "dataset": 0.5}),
        ("--model.init_args.reward=null", ("model", "init_args", "reward"), None),
        ("--data.init_args.train_options.count=7", ("data", "init_args", "train_options", "count"), 7),
        ("--data.init_args.train=my #1.jsonl", ("data", "init_args", "train"), "my #1.jsonl"),
        ("--data.init_args.validation=200", ("data", "init_args", "validation"), 200),
    ],
)  # fmt: skip
def test_numbers_lists_and_null_are_read(argument, path, value):
    found = said_last(argument)
    for key in path:
        found = found[key]
    assert found == value
    assert type(found) is type(value)


def test_one_key_of_a_mapping_leaves_the_others_and_a_whole_mapping_replaces_it():
    options = said_last("--data.init_args.train_options.count=7")["data"]["init_args"]["train_options"]
    assert options == {"count": 7, "digits": 4, "seed": 0}
    twice = said_last("--data.init_args.train_options.count=7", "--data.init_args.train_options.seed=1")
    assert twice["data"]["init_args"]["train_options"] == {"count": 7, "digits": 4, "seed": 1}
    whole = said_last("--data.init_args.train_options={count: 7}")
    assert whole["data"]["init_args"]["train_options"] == {"count": 7}
    shares = ["--model.rollout.behavior={dataset: 1.0}", "--model.rollout.behavior.student=0.0"]
    assert said_last(*shares)["model"]["init_args"]["rollout"]["behavior"] == {"dataset": 1.0, "student": 0.0}


def test_arguments_in_a_row_are_one_overlay_and_later_ones_win():
    found = understood([*OVERLAY, "--trainer.max_steps=3", "--model.rollout.horizon=4", "--trainer.max_steps=5"])
    assert found.count("-c") == 3
    assert json.loads(found[-1])["trainer"] == {"max_steps": 5}


def test_a_class_that_is_named_in_short_keeps_the_arguments_that_follow():
    found = said_last(
        "--model.init_args.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1", "--model.optimizer.momentum=0.9"
    )
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}
    assert found["model"]["init_args"]["optimizer"] == sgd


def test_so_does_one_of_a_teacher():
    weights = "--model.teachers.teacher.weights"
    teachers = said_last(f"{weights}=EMA", f"{weights}.rate=0.5")["model"]["init_args"]["teachers"]
    assert teachers["teacher"]["weights"] == {"class_path": "EMA", "init_args": {"rate": 0.5}}


def test_teachers_of_the_command_line_are_merged_by_name_too():
    teachers = said_last(f"{TEACHER}=null", "--model.init_args.teachers.big.weights=Live")["model"]["init_args"][
        "teachers"
    ]
    assert teachers == {"big": {"weights": "Live"}}


def test_what_is_appended_twice_is_there_twice(capsys):
    with pytest.raises(SystemExit):
        OPDCLI([*OVERLAY, "--trainer.callbacks+=Samples", "--trainer.callbacks+=CollapseAlarm",
                "--trainer.callbacks.patience=7", "--print_config"])  # fmt: skip
    callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert [found["class_path"].rpartition(".")[2] for found in callbacks] == ["Samples", "CollapseAlarm"]
    assert callbacks[1]["init_args"]["patience"] == 7
