"""benchmarks/methods.py: every method for texts has a row, all with equal budgets; what raises is said in its row."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import methods

    monkeypatch.setattr(methods, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(methods, "PAGE", tmp_path / "methods.md")
    monkeypatch.setattr(methods, "BENCHMARKS", tmp_path)
    yield methods
    sys.modules.pop("methods", None)


def test_every_method_for_texts_and_every_variant_has_a_row(benchmark):
    task = benchmark.Task("long")
    rows = task.arms
    assert {"gkd", "grpo", "opsd", "forward_kl", "lag_16_fresh"} <= rows.keys()
    assert not {"vision_opd", "samples", "anyflow"} & rows.keys()
    for part in ("arguments", "variants", "remarks"):
        assert task.settings[part].keys() <= rows.keys()
    assert rows["forward_kl"].overlays == ["methods/reverse_kl"]
    assert rows["gkd"].rate is None
    assert rows["grpo"].rate == task.settings["rates"]["PolicyGradient"]


def test_on_the_quickstart_teachers_are_shown_something(benchmark):
    rows = benchmark.Task("quickstart").arms
    default = {name for name, arm in rows.items() if arm.default}
    assert {"opsd", "sdpo", "rlsd", "mad_opd"} <= default
    assert not {"gkd", "grpo", "gold"} & default
    assert {"gkd", "grpo", "gold"} <= rows.keys()


def test_groups_are_of_fewer_prompts(benchmark, tmp_path):
    task = benchmark.Task("long")
    batch = {
        name: next(a for a in task.command(task.arms[name], 3, tmp_path, []) if "batch_size" in a)
        for name in ("grpo", "gkd")
    }
    assert batch == {"grpo": "--model.rollout.batch_size=4", "gkd": "--model.rollout.batch_size=32"}


def test_a_run_that_is_there_is_not_made_again_and_the_table_stands_between_its_comments(benchmark, monkeypatch):
    old = "above\n<!-- make methods: long -->\nold\n<!-- end -->\nbelow\n<!-- end -->\n"
    benchmark.PAGE.write_text(old, encoding="utf-8")
    task = benchmark.Task("long")
    for seed, after in enumerate((0.5, 0.75)):
        path = task.runs / "gkd" / str(seed) / "result.json"
        path.parent.mkdir(parents=True)
        result = {"accuracy": {"0": 0.25, "60": after}, "rollout": 2e5, "teacher": 1e5, "cpu_s": 70}
        path.write_text(json.dumps(result), encoding="utf-8")
    monkeypatch.setattr(benchmark, "run", lambda arguments: sys.exit(3))
    task.train(task.arms["gkd"], 1, [])
    task.train(task.arms["vopd"], 0, [])
    assert task.known()["gkd"]["1"]["cpu_s"] == 70
    assert "SystemExit: 3" in task.known()["vopd"]["0"]["error"]
    task.write(2)
    above, *table = benchmark.PAGE.read_text(encoding="utf-8").splitlines()
    assert above == "above"
    assert "| `gkd` |  | 25.0 | 62.5 ± 17.7 | 200 | 100 | 70 | 2 |  |" in table
    assert any(line.startswith("| `vopd` |") and "SystemExit: 3" in line for line in table)
    assert table[-3:] == ["<!-- end -->", "below", "<!-- end -->"]
    shutil.rmtree(benchmark.RUNS)  # another checkout has none of them
    assert task.known()["gkd"]["0"]["accuracy"]["60"] == 0.5


def test_heads_say_what_the_tables_do_and_keep_what_was_measured_elsewhere(benchmark, tmp_path):
    configs = tmp_path / "configs"
    shutil.copytree(benchmark.shipped_configs(), configs)
    elsewhere = (configs / "methods/text/gold.yaml").read_text(encoding="utf-8")
    for task, name, after in (
        ("long", "tip", 0.5),
        ("long", "tip", 0.7),
        ("quickstart", "tip", 0.9),
        ("long", "gold", 0.1),
    ):
        runs = benchmark.Task(task).runs / name
        path = runs / str(len([*runs.glob("*")])) / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"accuracy": {"0": 0.25, "60": after}}), encoding="utf-8")
    for _ in range(2):  # the second time over what stands there
        benchmark.write_heads(configs)
        measured = {method.name: method.measured for method in benchmark.read_all(configs)}
        said = "60.0 % of text/long.yaml, 25.0 % before; 90.0 % of text/quickstart.yaml, 25.0 % before"
        assert measured["methods/tip"].startswith(said)
        assert (configs / "methods/text/gold.yaml").read_text(encoding="utf-8") == elsewhere
