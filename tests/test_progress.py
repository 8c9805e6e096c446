"""Progress: no long silence, steps of the whole run, and where everything is in the end."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from opd_lightning import progress
from opd_lightning.cli import OPDCLI
from opd_lightning.progress import Narrator, Phase, duration
from opd_lightning.quiet import ADVERTISED, says_something
from opd_lightning.rollout_settings import Rollout
from opd_lightning.step_progress import bar
from tests.tiny import LongerIsBetter

MINIMAL = """
trainer: {default_root_dir: run, accelerator: cpu, max_steps: 2, val_check_interval: 2, log_every_n_steps: 1}
model:
  class_path: TextDistillation
  init_args:
    student: {path: "opd:assets/quickstart/student"}
    teachers:
      teacher: {weights: {class_path: Frozen, init_args: {pretrained: {path: "opd:assets/quickstart/teacher"}}}}
    objective: {terms: [{signal: ReverseKL}]}
    rollout: {batch_size: 2, horizon: 8}
    evaluation: {before: false}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: PromptData
  init_args: {train: "opd:assets/your_data/text/rows.jsonl", validation: 2}
"""


def test_a_phase_says_how_far_it_is_where_nothing_else_is_said(monkeypatch):
    monkeypatch.setattr(progress, "SILENCE", 0.1)
    said: list[str] = []
    narrator = Narrator(said.append)
    with narrator.phase("reading"), narrator.phase("rows", 10) as inner:
        inner.done = 5
        while not said:
            time.sleep(0.05)
    assert re.fullmatch(r"… rows: 5 of 10, \d+ s so far, about \d+ s still", said[0])
    assert narrator.phases == []


def test_a_phase_is_quiet_where_somebody_spoke(monkeypatch):
    monkeypatch.setattr(progress, "SILENCE", 60.0)
    said: list[str] = []
    narrator = Narrator(said.append)
    narrator.spoken -= 100.0
    with narrator.phase("training"):
        time.sleep(0.1)
    assert said == []


def test_lines_of_phases():
    phase = Phase("rollouts", began=100.0)
    assert phase.line(112.0) == "… rollouts: 12 s so far"
    phase.total, phase.done = 512, 128
    assert phase.line(112.0) == "… rollouts: 128 of 512, 12 s so far, about 36 s still"
    assert phase.line(220.0) == "… rollouts: 128 of 512, 2 min 00 s so far, about 6 min still"
    assert phase.line(228.0).startswith("… rollouts: 128 of 512, 2 min 08 s so far")
    assert [duration(s) for s in (45, 700, 9e3, 3e5)] == ["45 s", "12 min", "2.5 h", "3.5 days"]


def test_advertisements_are_dropped():
    record = type("Record", (), {"getMessage": lambda self: f"{ADVERTISED[0]}: try our cloud"})()
    assert not says_something(record)
    record = type("Record", (), {"getMessage": lambda self: "What an earlier run left is now elsewhere"})()
    assert says_something(record)


def test_steps_of_the_whole_run_also_after_a_resume(tmp_path, capsys, monkeypatch):
    """Into a pipe: a line every logged step, one for each validation, and in the end where everything is."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(MINIMAL, encoding="utf-8")
    OPDCLI(["fit", "-c", "mine.yaml", "--trainer.max_steps=2"])
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ") and "/2" in line]
    assert [line.split(" ")[1] for line in steps] == ["1/2", "2/2"]
    for word in ("ReverseKL ", "lr 1.0e-03", "gradient ", "s/step", "rollouts", "tokens/s", "tokens so far"):
        assert word in steps[-1]
    assert "left" in steps[0]
    assert any(line.startswith("step 2: ") for line in lines), "the validation"
    assert lines[-1].startswith("next: opd report run, which writes run/report.html; more steps: opd fit -c run/config")
    assert "samples: run/samples.jsonl" in lines
    (first,) = re.findall(r"([\d,]+) tokens so far", steps[-1])
    # the same run goes on
    OPDCLI(["fit", "-c", "mine.yaml", "--trainer.max_steps=3", "--ckpt_path=last"])
    (step,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ") and "/3" in line]
    assert step.startswith("step 3/3 ")
    assert int(re.findall(r"([\d,]+) tokens so far", step)[0].replace(",", "")) > int(first.replace(",", ""))


def test_tokens_are_counted_over_all_steps(world, tmp_path):
    module = world.module(rollout=Rollout(batch_size=4, micro_batch_size=2, horizon=6), reward=LongerIsBetter())
    trained: list[int] = []

    def counting(batch):
        trained.append(int(batch.trajectories.mask.sum()))
        return step(batch, 0)

    step = module.training_step
    module.training_step = lambda batch, batch_idx: counting(batch)
    trainer = world.fit(module, tmp_path, steps=3)
    assert float(trainer.callback_metrics["train/tokens_so_far"]) == sum(trained)
    assert {"time/backward_share", "time/update_share", "time/step_s", "train/lr"} <= set(trainer.callback_metrics)
    assert float(trainer.callback_metrics["train/gradient_norm"]) > 0


@pytest.mark.parametrize("given", [["--trainer.enable_progress_bar=false"], ["--trainer.callbacks=RichProgressBar"]])
def test_another_bar_takes_its_place(tmp_path, capsys, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(MINIMAL, encoding="utf-8")
    OPDCLI(["fit", "-c", "mine.yaml", "--trainer.max_steps=1", "--trainer.limit_val_batches=0", *given])
    assert "next: opd report" not in capsys.readouterr().out


def test_the_bar_keeps_steps_and_time_on_a_narrow_terminal():
    shown, console = bar(), Console(width=80, file=io.StringIO())
    shown.add_task("ReverseKL 0.2036 · " * 20, total=10_000, completed=1_234)
    console.print(shown.get_renderable())
    (line,) = console.file.getvalue().splitlines()
    assert "1234/10000" in line
    assert "left" in line
    assert "ReverseKL 0.2036" in line
