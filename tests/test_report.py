"""The report of a run reads what the loggers wrote."""

from __future__ import annotations

import json

import pytest
import yaml

from opd_lightning.cli import run
from opd_lightning.report import draw, measures, read_curves, read_run, report, write_page
from opd_lightning.report_page import verdict
from tests.test_resume import PLAIN, configuration


def log(folder, version, table):
    path = folder / "logs" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text(table, encoding="utf-8")


@pytest.fixture
def run_folder(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 7}), encoding="utf-8")
    first, second = tmp_path / "logs" / "version_0", tmp_path / "logs" / "version_1"
    first.mkdir(parents=True)
    second.mkdir()
    (first / "metrics.csv").write_text(
        "epoch,step,val/accuracy,val/teacher/accuracy,train/length\n,0,0.25,1.0,\n0,0,,,9.0\n0,4,,,8.0\n0,4,0.5,,\n",
        encoding="utf-8",
    )
    (second / "metrics.csv").write_text("epoch,step,val/accuracy\n0,9,0.75\n", encoding="utf-8")
    rows = [
        {"step": 0, "who": "student", "prompt": "1+1=", "completion": "3", "reward": 0.0},
        {"step": 10, "who": "student", "prompt": "1+1=", "completion": "2", "reward": 1.0},
        {"step": 0, "who": "teacher", "prompt": "1+1=", "completion": "2", "reward": 1.0},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def test_curves_go_on_over_a_resumed_run(run_folder):
    assert read_curves(run_folder)["val/accuracy"] == [(0, 0.25), (5, 0.5), (10, 0.75)]


def test_steps_of_curves_are_those_that_were_done(run_folder):
    """Lightning counts from 0, in training; what is logged before it, and by `opd validate`, has their number."""
    assert read_curves(run_folder)["train/length"] == [(1, 9.0), (5, 8.0)]
    log(run_folder, 2, "epoch,step,val/accuracy\n,12,0.875\n")
    assert read_curves(run_folder)["val/accuracy"][-1] == (12, 0.875)
    log(run_folder, 2, "epoch,step,val/accuracy\n0,0,0.125\n")  # of a student that was never trained
    assert read_curves(run_folder)["val/accuracy"][0] == (0, 0.125)
    # a validation after the first step is none before it
    log(run_folder, 2, "epoch,step,val/accuracy\n,0,0.25\n0,0,0.375\n")
    assert read_curves(run_folder)["val/accuracy"][:2] == [(0, 0.25), (1, 0.375)]


def test_the_step_that_is_told_is_the_last_one_that_was_scored(run_folder, capsys):
    log(run_folder, 2, "epoch,step,train/length\n0,12,8.0\n0,14,8.0\n")
    assert report(run_folder)["after_step"] == 10
    assert "after 10 steps" in capsys.readouterr().out
    assert verdict(read_run(run_folder, "mine")).startswith("After 10 optimizer steps the student solves 75.0%")


def test_a_measure_of_retention_is_no_teachers(run_folder, capsys):
    log(run_folder, 2, "step,val/retention/accuracy,val/retention/kl\n0,0.5,0\n10,0.5,1\n")
    assert "retention" not in report(run_folder)
    assert "retention has" not in verdict(read_run(run_folder, "mine"))
    assert capsys.readouterr().out.count("│ retention/") == 2, "a row each"


def test_how_many_are_solved_in_several_tries_is_in_the_table(run_folder, capsys):
    log(
        run_folder, 2, "step,val/pass@4,val/teacher/pass@4,val/length,val/teacher/length\n0,0.375,1,8,8\n10,0.875,,8,\n"
    )
    assert report(run_folder)["measures"]["pass@4"] == {"before": 0.375, "after": 0.875, "teacher": 1.0}
    assert "87.5%" in capsys.readouterr().out
    assert "<td>pass@4</td><td class=n>37.5%</td>" in write_page([run_folder]).read_text(encoding="utf-8")


def test_the_report_of_a_run_knows_nothing_of_an_earlier_one(tmp_path, make_world):
    """Also where loggers of the new one have begun before it sets the earlier one's aside."""
    config = configuration(tmp_path, make_world("text"), PLAIN)
    fit = ["fit", "-c", str(config), "--trainer.logger=null"]
    run([*fit, "--trainer.max_steps=3"])
    report(tmp_path)
    run([*fit, "--trainer.max_steps=1", "--seed_everything=5"])
    assert {step for points in read_curves(tmp_path).values() for step, _ in points} == {1}
    earlier = tmp_path / "checkpoints" / "earlier-1"
    assert (earlier / "logs" / "version_0" / "metrics.csv").exists()
    assert {"result.json", "curves.png"} <= {path.name for path in earlier.iterdir()}
    assert not (tmp_path / "result.json").exists()
    run([*fit, "--trainer.max_steps=2", "--seed_everything=5", "--ckpt_path=last"])
    assert {step for points in read_curves(tmp_path).values() for step, _ in points} == {1, 2}, "it went on from it"


def test_report_writes_result_and_picture(run_folder, capsys):
    found = report(run_folder, since=0.0)
    assert json.loads((run_folder / "result.json").read_text(encoding="utf-8")) == found
    assert {key: found[key] for key in ("before", "after", "after_step", "teacher", "seed")} == {
        "before": 0.25,
        "after": 0.75,
        "after_step": 10,
        "teacher": 1.0,
        "seed": 7,
    }
    assert found["wall_s"] > 0
    assert (run_folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "after 10 steps" in printed
    assert "1+1=2 ✓" in printed
    assert "1+1=3" not in printed, "only the last completions are shown"


def test_report_has_a_table_of_what_else_was_measured(run_folder, capsys):
    assert "measures" not in report(run_folder)
    config = {"seed_everything": 7, "model": {"init_args": {"evaluation": {"metrics": {"in_form": "JSONForm"}}}}}
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (run_folder / "logs" / "version_2").mkdir()
    (run_folder / "logs" / "version_2" / "metrics.csv").write_text(
        "step,val/in_form,val/teacher/in_form,val/length,val/teacher/length,val/retention/kl,val/retention/perplexity\n"
        "0,0.0,0.75,25.0,9.0,0.0,12.345\n10,0.5,,8.04,,0.1234,13.0\n",
        encoding="utf-8",
    )
    assert report(run_folder)["measures"] == {
        "in_form": {"before": 0.0, "after": 0.5, "teacher": 0.75},
        "length": {"before": 25.0, "after": 8.04, "teacher": 9.0},
        "retention/kl": {"before": 0.0, "after": 0.1234},
        "retention/perplexity": {"before": 12.345, "after": 13.0},
    }
    printed = capsys.readouterr().out
    for text in ("in_form", "50.0%", "75.0%", "8.0", "0.123", "13.00"):
        assert text in printed


def test_scores_of_the_harness_are_in_the_table(run_folder, capsys):
    (run_folder / "logs" / "version_2").mkdir()
    (run_folder / "logs" / "version_2" / "metrics.csv").write_text(
        "step,val/lm_eval/closed/acc\n0,0.25\n10,0.375\n", encoding="utf-8"
    )
    assert report(run_folder)["measures"]["lm_eval/closed/acc"] == {"before": 0.25, "after": 0.375}
    assert "0.375" in capsys.readouterr().out


def test_what_was_measured_before_training_is_no_measure_of_training(run_folder, capsys):
    (run_folder / "logs" / "version_1" / "metrics.csv").unlink()
    (run_folder / "logs" / "version_0" / "metrics.csv").write_text(
        "step,val/accuracy,val/teacher/accuracy,train/length\n0,0.305,1.0,\n4,,,8.0\n", encoding="utf-8"
    )
    found = report(run_folder)
    assert (found["before"], found["after"], found["after_step"]) == (0.305, None, None)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("30.5%") == 1
    assert "trainer.val_check_interval" in printed
    assert "opd validate -c" in printed
    assert "--ckpt_path=last" in printed


def test_a_run_without_accuracy_has_a_report(run_folder):
    for version in (0, 1):
        (run_folder / "logs" / f"version_{version}" / "metrics.csv").write_text(
            "step,train/length\n4,8.0\n", encoding="utf-8"
        )
    (run_folder / "samples.jsonl").unlink()
    assert report(run_folder)["before"] is None


def test_lengths_alone_are_no_measures():
    assert measures({"val/length": [(0, 1.0), (5, 2.0)]}, {}) == {}


@pytest.mark.parametrize("table", [None, "", "step,train/length\n"])
def test_a_run_that_ended_before_its_first_step_says_so(tmp_path, table):
    if table is not None:
        (tmp_path / "logs" / "version_0").mkdir(parents=True)
        (tmp_path / "logs" / "version_0" / "metrics.csv").write_text(table, encoding="utf-8")
    what = r"there is no logs/version_\*/metrics.csv" if table is None else "metrics.csv is empty"
    with pytest.raises(FileNotFoundError, match=rf"{what}. Either the run ended before its first step \(opd fit -c"):
        read_curves(tmp_path)


def test_a_run_that_logged_nothing_of_the_panels_is_drawn(tmp_path):
    draw({"train/loss/Mine": [(1, 0.5), (2, 0.25)]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
