"""Mistakes as newcomers make them: `opd check` says file, row, column and what would be right, before any training."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from opd_lightning.check import main

TEXT = """
trainer: {default_root_dir: run, accelerator: cpu, max_steps: 20, val_check_interval: 10}
model:
  class_path: TextDistillation
  init_args:
    student: {path: "opd:assets/quickstart/student"}
    teachers:
      teacher: {weights: {class_path: Frozen, init_args: {pretrained: {path: "opd:assets/quickstart/teacher"}}}}
    objective: {terms: [{signal: ReverseKL}]}
    rollout: {batch_size: 4, horizon: 60}
    reward: {class_path: ExactMatch, init_args: {after: "#"}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data: {class_path: PromptData, init_args: {train: rows.jsonl, validation: 8}}
"""
SCREENS = """
trainer: {default_root_dir: run, accelerator: cpu, max_steps: 20, val_check_interval: 10}
model:
  class_path: GUIGroundingDistillation
  init_args:
    student: {path: "opd:assets/gui_quickstart/student"}
    teachers: {teacher: {weights: Initial, view: Spotlight}}
    objective: {terms: [{signal: ForwardKL}]}
    rollout: {batch_size: 4, horizon: 12}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data: {class_path: ImageData, init_args: {train: rows.jsonl, validation: 4}}
"""
Rows = list[dict[str, Any]]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        "opd_lightning.foresight.forecast", lambda *_: iter(())
    )  # memory, the slowest of what is computed
    return tmp_path


def sums(count: int = 40) -> Rows:
    pairs = [(1012 + i, 2345 + 7 * i) for i in range(count)]
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b), "solution": f"#{a + b}"} for a, b in pairs]


def screens() -> Rows:
    rows = []
    for i in range(16):
        Image.new("RGB", (320, 320), (i * 9, 90, 200)).save(f"screen{i}.png")
        box = [18 * i, 18 * (15 - i), 18 * i + 30, 18 * (15 - i) + 30]
        rows.append({"image": f"screen{i}.png", "prompt": f"click on button {i}", "box": box})
    return rows


def found(capsys, config: str, rows: Rows, **init_args: Any) -> list[dict[str, Any]]:
    """What `opd check` finds doubtful or bad; keyword arguments go over those of the model."""
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return looked_at(capsys, config, **init_args)


def looked_at(capsys, config: str, **init_args: Any) -> list[dict[str, Any]]:
    Path("mine.yaml").write_text(config, encoding="utf-8")
    Path("over.yaml").write_text(yaml.dump({"model": {"init_args": init_args}}), encoding="utf-8")
    with suppress(SystemExit):
        main(["-c", "mine.yaml", "-c", "over.yaml", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    return [finding for finding in findings if finding["verdict"] in ("doubtful", "bad")]


def change(row: int, **columns: Any) -> Callable[[Rows], None]:
    """Gives a row, counted from 1, other values; a column with None is left out."""

    def changed(rows: Rows) -> None:
        rows[row - 1] |= columns
        for name in [name for name, value in columns.items() if value is None]:
            del rows[row - 1][name]

    return changed


def test_bad_rows_of_screens_are_told_at_once(folder, capsys):
    """Boxes as fractions, boxes with a width and a height, an image that is not there; the other rows are looked at."""
    rows = screens()
    for mistake in (change(10, box=[0.1, 0.2, 0.3, 0.4]), change(9, image="gone.png"), change(3, box=[40, 60, 30, 20])):
        mistake(rows)
    findings = found(capsys, SCREENS, rows)
    bad = [finding for finding in findings if finding["verdict"] == "bad"]
    assert {finding["name"] for finding in bad} == {"bad row"}
    said = "\n".join(finding["text"] for finding in bad)
    assert "rows.jsonl, row 10: the box looks normalized to 0…1: [0.1, 0.2, 0.3, 0.4]; pixels are needed" in said
    assert f"rows.jsonl, row 9: there is no image file: gone.png (from {folder})" in said
    assert "rows.jsonl, row 3: the box looks like [x, y, width, height]: [40, 60, 30, 20]; [x1, y1, x2, y2]" in said
    assert all("data.on_bad_row: skip" in finding["advice"] for finding in bad)


def test_ten_bad_rows_are_told_at_once(folder, capsys):
    """Six kinds in one file, also below the level of rows; of a kind two, and how many there are."""
    rows = sums()
    for mistake in (change(5, prompt=""), change(7, answer=None), change(14, prompt="1+" * 150 + "1=")):
        mistake(rows)
    for row in range(20, 25):
        change(row, prompt=[{"role": "usr", "content": "1+1="}])(rows)
    lines = [json.dumps(row).encode() for row in rows]
    lines[11] = lines[11].replace(b'"answer"', b'answer"')
    lines[2] = lines[2].replace(b'"#', b'"\xe9#')
    Path("rows.jsonl").write_bytes(b"\n".join(lines))
    findings = looked_at(capsys, TEXT)
    said = "\n".join(finding["text"] for finding in findings if finding["name"].startswith("bad row"))
    assert "row 12: invalid JSON: Expecting property name enclosed in double quotes at column" in said
    assert "write one JSON object a line" in said
    assert "row 3: invalid JSON: not UTF-8 at byte" in said
    assert "save the file as UTF-8" in said
    assert "row 5: prompt is empty" in said
    assert "row 7: answer is missing" in said
    assert "row 14: the prompt's 302 tokens" in said
    assert "'prompt' is text in rows.jsonl, row 1, and a list in rows.jsonl, row 20" in said
    assert "data.train: 3 more" in said


def test_roles_that_are_misspelled(folder, capsys):
    findings = found(capsys, TEXT, [{**row, "prompt": [{"role": "usr", "content": row["prompt"]}]} for row in sums()])
    texts = [finding["text"] for finding in findings]
    assert "row 1: message 1 of the prompt has the role 'usr'; did you mean 'user'?" in texts[0]
    assert any("more; in all" in text for text in texts)


def test_a_column_that_is_called_otherwise(folder, capsys):
    (finding,) = found(capsys, TEXT, [{"question": row["prompt"], "answer": row["answer"]} for row in sums()])
    assert "has no column 'prompt', which the rollout needs; it has question, answer" in finding["text"]
    assert "data.columns maps a column to another name" in finding["text"]


@pytest.mark.parametrize("other", [False, True])
def test_held_out_rows_that_are_trained_on(folder, capsys, other):
    """Doubles in one file, of which a part is held out; or a file whose rows are in the other."""
    config = TEXT
    if other:
        Path("held.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in sums()[30:]), encoding="utf-8")
        config = TEXT.replace("validation: 8", "validation: held.jsonl")
    (finding,) = found(capsys, config, sums() if other else [*sums(20), *sums(20)])
    assert finding["name"] == "held out"
    expected = "10 of 10 held-out rows" if other else "8 of 8 held-out rows"
    assert expected in finding["text"]
    assert "held.jsonl, row 1 as rows.jsonl, row 31" in finding["text"] or not other
    assert "data.validation" in finding["advice"]


@pytest.mark.slow
def test_the_same_words_about_other_images_are_other_questions(folder, capsys):
    rows = [{**row, "prompt": "click on the button"} for row in screens()]
    assert "held out" not in [finding["name"] for finding in found(capsys, SCREENS, rows)]


@pytest.mark.parametrize(
    ("template", "text", "advice"),
    [
        ("{{ prompt }}", "it is what the student sees", "The rows also have: answer, solution"),
        ("{ solution }?{{ prompt }}", "can't read what it is shown", "correct the row"),
        ("{{ solutoin }}?{{ prompt }}", "no column 'solutoin', which model.teachers.teacher needs", "nothing after"),
    ],
)
def test_a_template_that_ignores_its_column(folder, capsys, template, text, advice):
    view = {"class_path": "PromptView", "init_args": {"prompt": template}}
    finding, *_ = found(capsys, TEXT, sums(), teachers={"teacher": {"view": view}})
    assert text in finding["text"]
    assert advice in finding["advice"]


@pytest.mark.slow
def test_single_braces_that_a_model_can_read(folder, capsys):
    view = {"class_path": "PromptView", "init_args": {"prompt": "click at { where }: {{ prompt }}"}}
    rows = [{**row, "where": str(row["box"][:2])} for row in screens()]
    findings = found(capsys, SCREENS, rows, teachers={"teacher": {"view": view}})
    (finding,) = [finding for finding in findings if finding["name"] == "view"]
    assert "has { where } in it, word for word" in finding["text"]
    assert finding["advice"] == "columns are written with two braces: {{ where }}"


def test_a_reward_that_never_fires(folder, capsys):
    Path("never.py").write_text("def judge(completion, example):\n    return completion == 'right'\n", encoding="utf-8")
    (finding,) = found(capsys, TEXT, sums(), reward="never.judge")
    assert (finding["name"], finding["verdict"]) == ("reward", "bad")
    assert "rows.jsonl, row 1: its own answer '3357' 0.0, another row's" in finding["text"]
    assert "Tried: answer, boxed, sentence, solution" in finding["advice"]
