"""`opd check`: mistakes that people make are named before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from opd_lightning import pace
from opd_lightning.check import main
from opd_lightning.finding import Finding, as_json, show, summary
from opd_lightning.forecast import memory, memory_of
from opd_lightning.foresight import Foresight, forecast, positions

ROWS = [
    {"prompt": f"{a}+{b}=", "answer": str(a + b), "worked": "0+0+0=00"}
    for a, b in [(12, 34), (56, 27), (41, 18), (75, 19)]
]
MINE = """
trainer: {default_root_dir: runs/mine, accelerator: cpu, max_steps: 20, val_check_interval: 10}
model:
  class_path: TextDistillation
  init_args:
    student: {path: "opd:assets/quickstart/student"}
    teachers:
      teacher: {weights: {class_path: Frozen, init_args: {pretrained: {path: "opd:assets/quickstart/teacher"}}}}
    objective: {terms: [{signal: ReverseKL}]}
    rollout: {batch_size: 2, horizon: 60}
    reward: {class_path: ExactMatch, init_args: {after: "#"}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data: {class_path: PromptData, init_args: {train: rows.jsonl, validation: 1}}
"""


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("mine.yaml").write_text(MINE, encoding="utf-8")
    write(ROWS)
    return tmp_path


def write(rows: list[Any]) -> None:
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def checked(capsys, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and the findings by name; of one name the last."""
    code = 0
    try:
        main(["-c", "mine.yaml", "--json", *arguments])
    except SystemExit as error:
        code = error.code
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] == ("bad" if code else "good")
    return code, {finding["name"]: finding for finding in printed["findings"]}


def test_nothing_is_left_behind_and_what_is_right_is_green(mine, capsys):
    rows = "--data.train=opd:assets/your_data/text/rows.jsonl"
    code, found = checked(capsys, rows, "--data.validation=16", "--model.rollout.batch_size=16")
    assert code == 0
    doubts = {name: finding["text"] for name, finding in found.items() if finding["verdict"] not in ("good", "told")}
    assert not doubts
    assert {"models", "rows", "lengths", "row 3", "reward", "learning rate", "first KL", "memory"} <= set(found)
    assert {"agreement", "time", "rollouts"} <= set(found)
    assert "own answer '#" in found["reward"]["text"]
    written = dict(found["row 1"]["details"])["it wrote, trained"]
    assert "'<eos>' 1" in written
    assert sorted(path.name for path in mine.iterdir()) == ["mine.yaml", "rows.jsonl"]


@pytest.fixture
def without_memory(monkeypatch):
    """Leaves out the slowest of what is computed."""
    monkeypatch.setattr("opd_lightning.foresight.forecast", lambda *_: iter(()))


@pytest.mark.usefixtures("without_memory")
def test_six_mistakes_that_run_and_teach_nothing(mine, capsys):
    (mine / "always_zero.py").write_text("def judge(completion, example):\n    return 0.0\n", encoding="utf-8")
    mistakes = {
        "model": {
            "init_args": {
                "student": {"random_init": True},  # it never samples what the teacher wants
                "teachers": {
                    "teacher": {"view": {"class_path": "PromptView", "init_args": {"prompt": "{{ prompt }}"}}}
                },
                "rollout": {"horizon": 1},
                "reward": "always_zero.judge",
                "optimizer": {"init_args": {"lr": 10.0}},
            }
        },
        "data": {"init_args": {"validation": None}},
    }
    Path("mistakes.yaml").write_text(yaml.dump(mistakes), encoding="utf-8")
    code, found = checked(capsys, "-c", "mistakes.yaml")
    assert code == 1
    assert found["view"]["verdict"] == "doubtful"
    assert "name the column" in found["view"]["advice"]
    assert found["first KL"]["verdict"] == "doubtful"
    assert "ForwardKL or JSD" in found["first KL"]["advice"]
    assert found["reward"]["verdict"] == "bad"
    assert "Tried: answer, boxed, sentence" in found["reward"]["advice"]
    assert "10000 times off" in found["learning rate"]["advice"]
    assert "0.1 holds a tenth out" in found["rows"]["advice"]
    assert "raise rollout.horizon" in found["rollouts"]["advice"]


CHAT = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"question": "1+1="}] * 4, ["--model.reward=null"], "no column 'prompt'"),
        ([*ROWS[:2], {**ROWS[2], "answer": ""}, ROWS[3]], [], "rows.jsonl, row 3: answer is empty"),
        ([{**ROWS[0], "prompt": CHAT}] * 4, [], "the prompt is a chat but"),
        (ROWS, ["--model.rollout.max_prompt_length=3"], "max_prompt_length is 3"),
        (ROWS, ["--data.columns.answer=anwser"], "'anwser', which data.train does not have"),
        (ROWS, ["--model.rollout.horizon=4000"], "lower the horizon"),
    ],
)
@pytest.mark.usefixtures("without_memory")
def test_mistakes_that_are_refused(mine, capsys, rows, arguments, message):
    write(rows)
    code, found = checked(capsys, *arguments)
    assert code == 1
    assert message in (found.get("bad row") or found["run"])["text"]


def test_memory_is_planned_without_models(mine, capsys):
    code, found = checked(capsys, "--plan", "--device-memory", "24GB")
    assert (code, list(found)) == (0, ["memory"])
    assert "of 22.5 GB" in found["memory"]["text"]
    code, found = checked(capsys, "--plan", "--device-memory", "1.51GB")
    assert (code, found["memory"]["verdict"]) == (1, "bad")
    assert len(found["memory"]["advice"].split("; ")) == 3


def test_every_setting_can_be_looked_at(every_world, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "TIMED", 0.0)
    module = every_world.module()
    foresight = Foresight(tmp_path / "check")
    trainer = every_world.fit(module, tmp_path, steps=5, callbacks=[foresight], log_every_n_steps=1)
    assert trainer.global_step == 2
    names = [finding.name for finding in foresight.findings]
    assert names[:2] == ["models", "rows"]
    assert {"time", "rollouts", "agreement", "memory"} <= set(names)
    (computed,) = [finding for finding in foresight.findings if finding.name == "memory"]
    assert "GB computed of" in computed.text
    images = [terms for terms in module.forecast(trainer, None).phases().values() if {"eyes", "pixels"} <= set(terms)]
    assert bool(images) == hasattr(module, "image_gaps")
    assert all(weight.grad is None for weight in module.student.parameters()), "passes that count leave nothing behind"


def test_what_takes_loaded_models_to_compute_says_so():
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    module = SimpleNamespace(forecast=lambda *_: None, policies={})
    (finding,) = forecast(trainer, module, room=24e9)
    assert finding.verdict == "told"
    assert finding.text.endswith("does not compute it without loaded models: leave out --plan")


class Fits:
    """A forecast in numbers."""

    def __init__(self, size: float, **others: float) -> None:
        self.size, self.others, self.about = size, others, "as it is"

    def phases(self):
        return {
            "reading": {"weights": self.size / 2},
            "backward": {"weights": self.size / 2, "activations": self.size / 2},
        }

    def cheaper(self):
        return {name: Fits(size) for name, size in self.others.items()}


def test_what_does_not_fit_names_the_three_knobs_that_save_most():
    (finding,) = memory(Fits(20e9, a=19.9e9, b=15e9, c=10e9, d=12e9), room=16e9, reserved=1e9)
    assert (finding.verdict, finding.advice) == ("bad", "c: 10.00 GB; d: 12.00 GB; b: 15.00 GB")
    assert finding.text.startswith("20.00 GB computed of 15.0 GB (backward: weights)")
    (finding,) = memory(Fits(2e9, a=1e9), room=16e9, reserved=0)
    assert (finding.verdict, finding.advice) == ("good", "")
    (finding,) = memory(Fits(20e9), room=16e9, reserved=0)
    assert "no single knob" in finding.advice


def test_sizes_and_times_are_read_and_written():
    assert [memory_of(text) for text in ("24GB", "80 GiB", "1e0"[:1])] == [24e9, 80 * 2**30, 1]
    with pytest.raises(ValueError, match="write a size such as 24GB"):
        memory_of("much")
    assert positions(torch.tensor([[1.0, 3.0, torch.nan]])) == "1, 3, –, –"


def test_findings_are_printed_for_people_and_programs(capsys):
    findings = [Finding("a", "good", "fine"), Finding("b", "doubtful", "[red]", "look", [("x", "y")])]
    show(findings, Console(width=60))
    printed = capsys.readouterr().out
    assert "✓ a fine" in printed
    assert "→ look" in printed
    assert "[red]" in printed
    assert summary(findings) == "green, with 1 doubt"
    assert as_json([*findings, Finding("c", "bad", "no")])["verdict"] == "bad"


@pytest.mark.parametrize(("checkpointing", "measured"), [(False, 1.27), (True, 1.13)])
def test_the_peak_is_what_was_measured(checkpointing, measured):
    """The rows "full" of docs/performance.md, What fits: computed within a tenth of what was measured."""
    from transformers import Qwen3Config

    from opd_lightning.forecast import peak
    from opd_lightning.modalities.autoregressive.memory import Plan, Shape

    def shape(hidden: int, inner: int, layers: int, heads: int, keys: int) -> Shape:
        config = Qwen3Config(
            vocab_size=151_936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=keys, head_dim=64, tie_word_embeddings=True,
        )  # fmt: skip
        return Shape.of(config)

    plan = Plan(
        shape(256, 768, 4, 4, 2), shape(384, 1152, 6, 6, 3), prompt=32, completion=128, teacher_bits=32, micro=8,
        checkpointing=checkpointing, mixed=False, cpu=True,
    )  # fmt: skip
    size, phase, _ = peak(plan.phases())
    assert phase == "objective"
    assert size / 1e9 == pytest.approx(measured, rel=0.1)
