"""What docs/your_data.md says, done: its files are written, and its configurations train."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from opd_lightning.__main__ import execute
from opd_lightning.cli import OPDCLI, understood
from opd_lightning.config_file import ConfigError, read
from opd_lightning.modalities.autoregressive.advice import FULL, LORA
from opd_lightning.modalities.text.distill import configuration, main, parser
from opd_lightning.new import main as new
from opd_lightning.new import settings
from tests.tiny import CHAT_TEMPLATE, chat_tokenizer, save_model

PAGE = (Path(__file__).parents[1] / "docs" / "your_data.md").read_text(encoding="utf-8")
STUDENT, TEACHER = "opd:assets/quickstart/student", "opd:assets/quickstart/teacher"
QUICK = [
    "--trainer.max_steps=1",
    "--trainer.logger=false",
    "--trainer.limit_val_batches=0",
    "--model.evaluation.before=false",
]
WITH_TOOLS = "{% for tool in tools or [] %}{{ tool.function.name }}! {% endfor %}" + CHAT_TEMPLATE
BASE = """
trainer: {default_root_dir: run, accelerator: cpu, max_steps: 1, logger: false, val_check_interval: 1}
model:
  class_path: TextDistillation
  init_args:
    student: {path: STUDENT}
    teachers: {teacher: {weights: Initial}}
    objective: {terms: [{signal: ReverseKL}]}
    rollout: {batch_size: 2, horizon: 4}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of somebody who has just installed the package, with all files of the page in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    for name, text in files().items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def files() -> dict[str, str]:
    """The page's blocks, by the names of files in the paragraph before each, or in that before the last one."""
    texts: dict[str, str] = {}
    names: list[str] = []
    for before, code in re.findall(r"(.*?)```(?:json|python|yaml)\n(.*?)```", PAGE, re.DOTALL):
        paragraph = before.strip().rpartition("\n\n")[2]
        names += re.findall(r"`([\w/]+\.(?:jsonl|py|yaml))`", paragraph)
        texts[names.pop(0)] = code
    assert not names
    return texts


def chat_base(folder: Path, template: str = CHAT_TEMPLATE) -> list[str]:
    """A base configuration with a tiny chat model."""
    save_model(folder / "chat", tokenizer=chat_tokenizer(template), rows=104)
    (folder / "base.yaml").write_text(BASE.replace("STUDENT", "./chat"), encoding="utf-8")
    return ["fit", "-c", "base.yaml"]


def test_three_files(folder, recwarn):
    (command,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    execute([*shlex.split(command)[1:], "--trainer.max_steps=2"])
    assert not [str(warning.message) for warning in recwarn if "opd_lightning" in warning.filename]
    (table,) = Path("runs/mine").glob("logs/version_*/metrics.csv")
    curves = table.read_text(encoding="utf-8").splitlines()[0].split(",")
    assert {"val/accuracy", "val/better/accuracy", "val/itself/accuracy", "train/loss/JSD"} <= set(curves)


def test_chats_with_a_system_turn_for_the_teacher_and_pass_at_k(folder):
    cli = OPDCLI([*chat_base(folder), "-c", "chats.yaml", "-c", "pass.yaml", "--model.evaluation.before=false"])
    assert "val/pass@4" in cli.trainer.callback_metrics
    rows = [split[i] for split in (cli.datamodule.train, cli.datamodule.validation) for i in range(len(split))]
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)
    (look,) = [cli.model.teachers["teacher"].look(row) for row in rows if row["answer"] == "4"]
    assert [message["role"] for message in look["prompt"]] == ["system", "user"]


def test_tools(folder):
    data = ["--data=PromptData", "--data.train=tools.jsonl"]
    cli = OPDCLI([*chat_base(folder, WITH_TOOLS), *data, "--trainer.limit_val_batches=0"])
    ids = cli.model.prompt_ids(cli.datamodule.train[0], cli.model.policies["student"]).tolist()
    assert "add!" in cli.model.tokenizer().decode(ids)
    with pytest.raises(ValueError, match=r"tools.jsonl, row 1: the row has tools, which the chat template"):
        OPDCLI([*chat_base(folder), *data])


def test_several_data_sets(folder):
    (folder / "base.yaml").write_text(BASE.replace("STUDENT", STUDENT), encoding="utf-8")
    cli = OPDCLI(["fit", "-c", "base.yaml", "--model.teachers.teacher=null", "-c", "mixed.yaml", *QUICK[1:]])
    tasks = [row["task"] for row in cli.datamodule.train.to_list() + cli.datamodule.validation.to_list()]
    assert sorted(tasks) == ["sums"] * 3 + ["words"] * 2
    assert cli.trainer.global_step == 1


def test_a_function_alone_is_a_reward(folder):
    calling = {"class_path": "CallableReward", "init_args": {"function": "my_rewards.judge"}}
    fit = ["fit", "-c", "opd:text/quickstart.yaml"]
    words = understood([*fit, "--model.reward=my_rewards.judge", "--model.evaluation.metrics.own=my_rewards.judge"])
    inside = json.loads(words[-1])["model"]["init_args"]
    assert inside["reward"] == inside["evaluation"]["metrics"]["own"] == calling
    assert json.loads(understood([*fit, "-c", "pass.yaml"])[-1])["model"]["init_args"]["reward"] == calling
    kept = json.loads(understood([*fit, "-c", "kept.yaml"])[-1])["model"]["init_args"]["evaluation"]
    assert kept["retention"] == "opd:assets/facts/unrelated.jsonl"


def test_a_function_that_is_not_there_is_named(folder, capsys):
    with pytest.raises(SystemExit):
        understood(["fit", "-c", "opd:text/quickstart.yaml", "--model.reward=os.path.joint"])
    assert "os.path.joint can't be imported" in capsys.readouterr().err


def test_the_page_has_the_rates_that_are_used():
    for table in (FULL, LORA):
        for _, rate in table:
            assert f"{rate:.0e}".replace("e-0", "e-") in PAGE


# -- opd distill ---------------------------------------------------------------------------------------------------


def distilled(*arguments: str) -> dict:
    return configuration(*parser().parse_known_args(["--student", STUDENT, "--teacher", TEACHER, *arguments]))


def test_distill_prints_what_it_runs_and_runs_it(folder, capsys):
    main(["--student", STUDENT, "--teacher", TEACHER, "--data", "sums.jsonl", "--steps", "1", "--out", "own", *QUICK])
    printed = yaml.safe_load(capsys.readouterr().out.partition("\n# this is")[0])
    assert printed == read("own/distill.yaml").values
    assert printed["data"]["init_args"]["columns"] == {"prompt": "question"}
    assert printed["model"]["init_args"]["rollout"] == {"batch_size": 3, "horizon": 128}
    assert (folder / "own" / "checkpoints" / "last.ckpt").exists()


def test_distill_prints_a_command_that_a_shell_reads_as_it_was_meant(folder, capsys):
    extra = ["--print", "--out", "my own", "--model.notes={hints: Peers}"]
    main(["--student", STUDENT, "--teacher", TEACHER, "--data", "sums.jsonl", *extra])
    again = capsys.readouterr().out.rpartition("the same again: ")[2]
    assert shlex.split(again) == ["opd", "fit", "-c", "my own/distill.yaml", extra[-1]]


def test_distill_fills_in_what_models_and_rows_say(folder):
    config = distilled(
        "--data", "chats.jsonl", "--lora", "--steps", "30", "--reward", "my_rewards.judge", "--lr", "0.1"
    )
    inside, data = config["model"]["init_args"], config["data"]["init_args"]
    assert inside["student"]["lora"] == {"r": 32, "alpha": 64}
    assert inside["reward"] == "my_rewards.judge"
    assert inside["optimizer"]["init_args"]["lr"] == 0.1
    assert (data["columns"], data["last_answer"]) == ({"prompt": "messages"}, "drop")
    assert config["trainer"]["val_check_interval"] == 6 * config["trainer"]["accumulate_grad_batches"]
    assert distilled("--data", "sums.jsonl")["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data", "sums.jsonl", "--prompt", "ask"],
            r"no column 'ask'; name one with --prompt: question, worked, answer",
        ),
        (["--data", "rows.jsonl"], r"none of the columns looks like a prompt; name one with --prompt: text"),
        (["--data", "nowhere.jsonl"], r"--data: there is no file or folder 'nowhere.jsonl'"),
        (["--data", "sums.jsonl", "--steps", "0"], "--steps is 0"),
        (["--data", "sums.jsonl", "--batch", "0"], "--batch is 0"),
        (["--data", "sums.jsonl", "--lr", "0"], "--lr is 0"),
        (["--data", "sums.jsonl", "--horizon", "-1"], "--horizon is -1"),
        (["--data", "sums.jsonl", "--lr", "nan"], "--lr must be a number"),
    ],
)
def test_distill_says_what_is_wrong(folder, arguments, message):
    Path("rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        distilled(*arguments)


def test_distill_reads_options_of_the_source(folder):
    rows = "python:opd_lightning.modalities.text.quickstart.sums"
    config = distilled("--data", rows, "--data.train_options.count=50", "--data.train_options.digits=2")
    assert config["data"]["init_args"]["validation"] == 5


# -- opd new -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", settings())
def test_new_runs_as_it_stands(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    new([setting, "mine"])
    assert "opd fit -c mine/config.yaml" in capsys.readouterr().out
    execute(["fit", "-c", "mine/config.yaml", *QUICK, "--model.rollout.batch_size=2"])
    assert Path("mine/run/checkpoints/last.ckpt").exists()
    assert "opd:assets/your_data" not in Path("mine/config.yaml").read_text(encoding="utf-8")


def test_new_overwrites_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="is there already"):
        new(["text", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"there is no setting 'texts'; did you mean text\?$"):
        new(["texts", str(tmp_path / "mine")])
