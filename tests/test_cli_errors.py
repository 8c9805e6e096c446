"""Errors of construction in a sentence, with key, file and line; bugs keep their traceback."""

from __future__ import annotations

import pytest
import torch

from opd_lightning.cli import OPDCLI
from opd_lightning.cli_errors import Parser, explain, sentence
from opd_lightning.config_file import said
from opd_lightning.front import front
from opd_lightning.places import about

PROBLEMS = [
    ("objective: {terms: [{signal: ReverseKL, teacher: nobody}]}", "no teacher 'nobody' in model.teachers"),
    ("teachers: {big: {weights: Live}}", "model.teachers: nobody asks ['big']"),
    ("rollout: {temperature: -1}", "rollout.temperature must be >= 0"),
    ("rollout: {behavior: {student: 0.3, teacher: 0.3}}", "rollout.behavior: shares must be >= 0 and sum to 1"),
    (
        "reward: {class_path: CallableReward, init_args: {function: no.thing}}",
        "model.reward.function: CallableReward.function: 'no.th",
    ),
    ("evaluation: {samples: 3}", "evaluation.samples=3 greedy samples"),
    ("teachers: {student: {weights: Live}}", "model.teachers: 'student' has its meaning"),
    ("objective: {terms: [{signal: {class_path: JSD, init_args: {beta: 2}}}]}", "signal.beta must be in"),
]


@pytest.fixture
def problem(tmp_path, monkeypatch):
    """What is raised over a file that is laid over the quickstart."""
    monkeypatch.setattr(OPDCLI, "_run_subcommand", lambda self, subcommand: None)

    def find(text: str, *arguments: str) -> BaseException:
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(Exception, match=r".") as caught:
            OPDCLI(["fit", "-c", "opd:text/quickstart.yaml", "-c", str(tmp_path / "c.yaml"), *arguments])
        return caught.value

    return find


@pytest.mark.parametrize(("inner", "message"), PROBLEMS)
def test_what_a_check_finds_is_a_sentence(problem, inner, message):
    text = sentence(problem(f"model:\n  init_args:\n    {inner}\n"), Parser.sources)
    assert text is not None
    assert message in text
    assert "c.yaml, line 3" in text
    assert "--traceback" in text
    assert len(text.splitlines()) < 6
    assert "Traceback" not in text


def test_parts_of_other_libraries_check_too(problem):
    text = sentence(problem("trainer:\n  logger: WandbLogger\n"), Parser.sources)
    assert text is not None
    assert text.startswith("error: trainer.logger: Requirement 'wandb")
    assert "c.yaml, line 2" in text


def test_arguments_are_places_as_well(problem):
    text = sentence(problem("seed_everything: 1\n", "--model.rollout.horizon=0"), Parser.sources)
    assert text is not None
    assert "what the command line says: --model.rollout.horizon=0" in text


@pytest.mark.parametrize(
    ("argument", "start"),
    [
        ("--trainer.accelerator=gpu", "error: trainer.accelerator: No supported gpu backend"),
        ("--trainer.max_time=soon", "error: trainer.max_time: `Timer(duration='soon')` is not"),
        ("--trainer.strategy=ddpp", "error: trainer.strategy can't be built from this: "),
        (
            "--model.reward={class_path: CallableReward, init_args: {function: no.thing}}",
            "error: model.reward.function: ",
        ),
    ],
)
def test_the_argument_is_the_place_where_a_file_names_the_part(problem, argument, start):
    """The file names the trainer and the reward as well, and has no part in it."""
    text = sentence(problem("trainer: {max_steps: 3}\n", argument), Parser.sources)
    if "gpu" in argument and torch.cuda.is_available():
        pytest.skip("there is one")
    assert text is not None
    assert text.startswith(start)
    assert f"  in what the command line says: {argument}\n" in text


FILE = """model:
  reward: {class_path: Column, columns: [answer]}
  rollout: {horizon: 3}
data:
  columns: {prompt: q}
"""


@pytest.mark.parametrize(
    ("message", "argument", "place"),
    [
        ("data.columns maps 'prompt' to 'question'", "--data.columns.prompt=question", "--data.columns.prompt"),
        ("data.columns maps 'prompt' to 'q'", "--data.columns.answer=a", "line 5"),
        ("no row has the column anwser", "--model.reward.columns=[anwser]", "--model.reward.columns"),
        ("no row has the column answer", "--model.reward.other=thing", "line 2"),
        ("something is missing", "--model.reward.other=thing", ""),
        ("rollout.horizon must be >= 1", "--model.rollout.horizon=0", "--model.rollout.horizon"),
    ],
)
def test_a_place_is_the_one_that_a_message_means_or_none(tmp_path, message, argument, place):
    (tmp_path / "c.yaml").write_text(FILE, encoding="utf-8")
    found = about(message, ["Column"], said(["-c", str(tmp_path / "c.yaml"), argument]))[1]
    assert place in found if place else not found


def test_bugs_keep_their_traceback():
    def raised(call) -> BaseException:
        with pytest.raises(Exception, match=r".") as caught:
            call()
        return caught.value

    assert sentence(raised(lambda: {}["x"]), []) is None
    assert sentence(raised(lambda: int("x")), []) is None
    assert sentence(raised(lambda: [1, 2].index(3)), []) is None


def test_files_that_the_system_refuses_are_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "gone").read_text(encoding="utf-8")
    text = sentence(caught.value, [])
    assert text is not None
    assert str(tmp_path / "gone") in text


def test_types_are_said_once():
    message = (
        "Parser key \"seed_everything\":\n  Errors:\n  - Expected a <class 'bool'>\n  - Expected a <class 'int'>\n"
    )
    assert explain(f"{message}  Given value: abc\n", []) == "error: seed_everything: expected bool or int, got abc\n"
    inner = "Parser key \"a\":\n  Expected a <class 'int'>. Got value: many\n  Given value: {'b': {'a': 1}}\n"
    assert explain(inner, []) == "error: a: expected int, got many\n"


def test_what_is_missing_comes_from_a_configuration_that_is_named():
    message = "the following arguments are required: fit.data, fit.model"
    assert explain(message, []).endswith("nothing here has the key data and model; put a configuration first that has: "
                                         "-c opd:text/quickstart.yaml\n")  # fmt: skip
    overlay = front(["fit", "-c", "opd:overlays/teacher_ema.yaml"])
    assert "has: -c opd:text/quickstart.yaml -c opd:methods/text/sdft.yaml or " in explain(message, overlay)
