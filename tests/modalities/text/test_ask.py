"""`opd ask`: rows with a served teacher's texts, and a student that is fine-tuned on them."""

from __future__ import annotations

import json
import shlex

import pytest

from opd_lightning.cli import run
from opd_lightning.endpoint import BudgetSpent
from opd_lightning.modalities.text.ask import main
from tests.chatting import completion


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in range(1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def command(server, data, folder, *others):
    where = [f"--endpoint.url={server.url}", f"--endpoint.keep={folder / 'asked'}", "--endpoint.deadline=5"]
    return [*where, f"--data={data}", f"--into={folder / 'texts.jsonl'}", *others]


def asked(body):
    return body["messages"][-1]["content"]


def test_rows_keep_their_columns_and_get_texts(chatting, questions, tmp_path, capsys):
    server = chatting(lambda body: f"{asked(body)}{len(server.bodies)}")
    main(command(server, questions, tmp_path, "--draws=2", "--system=Be brief.", "--max_tokens=9"))
    rows = read(tmp_path / "texts.jsonl")
    assert [row["prompt"] for row in rows] == [f"{i}+{i}=" for i in range(1, 9) for _ in range(2)]
    assert all(row["completion"].startswith(row["prompt"]) and row["answer"] for row in rows)
    assert len({row["completion"] for row in rows}) == 16
    assert {body["messages"][0]["content"] for body in server.bodies} == {"Be brief."}
    assert {(body["temperature"], body["max_tokens"]) for body in server.bodies} == {(1.0, 9)}
    told = capsys.readouterr().out
    assert "holds 16 of 16 texts, 0 were cut (672 tokens spent)" in told
    assert f"--data.train={tmp_path / 'texts.jsonl'}" in told.replace("\n", " ")


def test_cut_and_empty_texts_are_left_out(chatting, questions, tmp_path, capsys):
    def answer(body):
        whole = completion("" if asked(body).startswith("2") else "text")
        if asked(body).startswith("1"):
            whole["choices"][0]["finish_reason"] = "length"
        return 200, whole

    main(command(chatting(answer), questions, tmp_path))
    assert [row["prompt"] for row in read(tmp_path / "texts.jsonl")] == [f"{i}+{i}=" for i in range(3, 9)]
    assert "6 of 8 texts, 1 were cut" in capsys.readouterr().out


def test_what_a_budget_ended_goes_on(chatting, questions, tmp_path):
    server = chatting(lambda body: "text")
    arguments = command(server, questions, tmp_path, "--endpoint.at_once=1")
    with pytest.raises(BudgetSpent):
        main([*arguments, "--endpoint.budget.tokens=100"])
    assert not (tmp_path / "texts.jsonl").exists()
    main(arguments)
    assert len(server.bodies) == 8
    assert len(read(tmp_path / "texts.jsonl")) == 8


@pytest.mark.parametrize(
    ("others", "message"),
    [(["--draws=0"], "it takes 1 or more"), (["--prompt=problem"], "no column 'problem'; name one with --prompt")],
)
def test_what_cannot_be_meant_is_refused(chatting, questions, tmp_path, others, message):
    with pytest.raises(ValueError, match=message):
        main(command(chatting(lambda body: ""), questions, tmp_path, *others))


def test_nothing_to_train_on_is_an_error(chatting, questions, tmp_path):
    with pytest.raises(ValueError, match="no row was written: 0 of 8 texts"):
        main(command(chatting(lambda body: " "), questions, tmp_path))


def test_a_student_is_fine_tuned_on_them_as_the_command_says(chatting, questions, tmp_path, capsys):
    main(command(chatting(lambda body: "4+4=08 #8"), questions, tmp_path))
    said = capsys.readouterr().out.replace("\n", " ").partition(" spent): ")[2]
    name, *options = shlex.split(said.replace("mine.yaml", "opd:text/quickstart.yaml"))
    small = ["--trainer.max_steps=1", "--trainer.logger=false", "--trainer.limit_val_batches=0"]
    small += ["--model.evaluation.before=false", "--model.rollout.batch_size=4", "--data.train_options={}"]
    assert name == "opd"
    run([*options, *small, f"--trainer.default_root_dir={tmp_path}"])
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
