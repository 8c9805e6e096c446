"""A conversation with a run's student and teachers, on pipes and on a terminal."""

from __future__ import annotations

import io
import json
import sys

import pytest
import rich.console
import torch
import yaml
from PIL import Image

from opd_lightning.modalities.autoregressive.chat import chat
from tests.exported import TEXT, exportable
from tests.tiny import chat_tokenizer, save_model

VIEW = {"class_path": "PromptView", "init_args": {"prompt": "{{ solution }}?{{ prompt }}"}}
TEACHERS = {"itself": {"weights": {"class_path": "Initial"}, "view": VIEW}}


def make_run(folder, base, own, setting=TEXT, **student):
    """A run's folder: configuration, held-out rows, and a checkpoint of a student that moved."""
    own = {"objective": {"terms": [{"signal": "CrossEntropy", "teacher": None}]}, "rollout": {"horizon": 6}} | own
    path = exportable(folder / "checkpoints" / "last.ckpt", base, setting, own=own, **student)
    config = yaml.safe_load(torch.load(path, weights_only=True)["opd_config"])
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "3+3=", "solution": "3+3=6"}) + "\n" * 2, encoding="utf-8")
    config["data"] = {"class_path": "PromptData", "init_args": {"train": str(rows), "validation": str(rows)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"seed_everything": 0}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatted")
    base = save_model(folder / "base", rows=0, tokenizer=chat_tokenizer())
    return make_run(folder / "run", base, {"teachers": TEACHERS}, lora={"r": 4, "alpha": 8})


@pytest.fixture
def talk(monkeypatch, capsys):
    def say(run, *lines, flags=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        chat([str(run), "--device=cpu", *flags])
        return capsys.readouterr()

    return say


def spoken(printed: str, who: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith(who)]


def test_student_and_teacher_answer_beside_each_other(talk, run):
    printed = talk(run, "1+1=", flags=["--columns.solution=1+1=2", "--before"]).out
    (student,), (teacher,), (before,) = (spoken(printed, who) for who in ("student: ", "itself: ", "before_training: "))
    assert len({text.partition(": ")[2] for text in (student, teacher, before)}) > 1
    assert "after 3 optimizer steps" in printed


def test_a_teacher_reads_through_its_view_what_is_given(talk, run):
    told = spoken(talk(run, "1+1=", flags=["--columns.solution=1+1=2"]).out, "itself")
    in_prompt = talk(run, "1+1=2?1+1=", flags=["--before", "--alone"]).out
    assert told[0].partition(": ")[2] == spoken(in_prompt, "before_training")[0].partition(": ")[2]
    (without,) = spoken(talk(run, "1+1=").out, "itself")
    assert "without its view, which reads solution: --columns.solution" in without
    with_row = spoken(talk(run, "/row 0").out, "itself")
    assert with_row[0].startswith("itself: ")


def test_a_conversation_is_remembered_and_forgotten(talk, run):
    flags = ["--alone"]
    once, again, fresh = (
        spoken(talk(run, *lines, flags=flags).out, "student") for lines in (["a"], ["a", "a"], ["a", "/reset", "a"])
    )
    assert len(once) == 1
    assert again[0] == fresh[0] == fresh[1] == once[0]
    assert again[1] != again[0]


def test_what_cannot_be_answered_is_said_and_the_rest_goes_on(talk, run):
    printed = talk(run, "", "/rows", "/row 7", "x" * 300, "é", "1+1=", "/quit", "2+2=", flags=["--alone"])
    assert len(spoken(printed.out, "student:")) == 1
    for problem in ("/rows is no command", "there are 1 held-out rows", "leave no room in its context of 256"):
        assert problem in printed.err


def test_a_checkpoint_has_its_student_alone(talk, run):
    checkpoint = run / "checkpoints" / "last.ckpt"
    printed = talk(checkpoint, "1+1=")
    assert [line.split(":")[0] for line in printed.out.splitlines()][-1] == "student"
    with pytest.raises(ValueError, match="is no folder of a run, which names its teachers"):
        chat([str(checkpoint), "--before"])


def test_what_is_not_there_is_named(talk, run, tmp_path):
    with pytest.raises(ValueError, match=r"--teacher=nobody: model.teachers has \['itself'\]"):
        chat([str(run), "--teacher=nobody"])
    with pytest.raises(ValueError, match="TextDistillation reads no images"):
        chat([str(run), "--image=x.png"])
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        chat([str(tmp_path)])


def test_a_terminal_shows_columns(monkeypatch, talk, run):
    monkeypatch.setattr(rich.console.Console, "is_terminal", property(lambda _: True))
    printed = talk(run, "1+1=").out
    assert "│" in printed
    assert "itself" in printed


def test_a_student_that_sees_is_shown_an_image(talk, make_world, tmp_path):
    world = make_world("vision_language")
    setting = "opd_lightning.modalities.vision_language.VisionLanguageDistillation"
    run = make_run(tmp_path / "run", world.student, {}, setting, freeze=world.freeze)
    answers = set()
    for color in ("red", "blue"):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{color}.png")
        flags = [f"--image={tmp_path / color}.png", "--temperature=1"]
        answers |= set(spoken(talk(run, "1+1=", flags=flags).out, "student:"))
    assert len(answers) == 2
