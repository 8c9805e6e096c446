"""A setting whose students are no transformers, written from a page: it learns, stops, ages and resumes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from tests.processes import finish, last, start

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "add_a_setting.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration in a folder of its own, where its run writes."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("control") / name
        folder.mkdir()
        (folder / "run.yaml").write_text((HERE / "control.yaml").read_text(encoding="utf-8"), encoding="utf-8")
        return folder / "run.yaml"

    return make


@pytest.fixture(scope="module")
def unbroken(config) -> Path:
    path = config("unbroken")
    finish(run(path))
    return path


def run(config: Path, *extra: str):
    return start(config, f"--trainer.default_root_dir={config.parent}", *extra)


def metrics(config: Path) -> list[dict[str, str]]:
    (log,) = config.parent.rglob("metrics.csv")
    names, *rows = [line.split(",") for line in log.read_text(encoding="utf-8").splitlines()]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_nothing_is_overridden_that_the_page_does_not_promise():
    promised = set(re.findall(r"`(\w+)(?:\([\w, ]*\))?`", PAGE))
    tree = ast.parse((HERE / "pilots.py").read_text(encoding="utf-8"))
    (setting,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Control"]
    methods = {node.name for node in setting.body if isinstance(node, ast.FunctionDef)}
    attributes = [node for node in setting.body if isinstance(node, ast.Assign)]
    fields = {name.id for node in attributes for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)}
    assert methods == {"collate", "sample", "distribution", "rewards"}
    assert fields == {"model_class", "provides", "columns"}
    assert methods | fields <= promised


def test_the_loop_has_no_name_for_what_only_some_settings_have():
    core = HERE.parents[1] / "opd_lightning"
    loop = [
        "module",
        "trajectory",
        "optimizer_step",
        "rollout",
        "rollout_settings",
        "actor",
        "worker",
        "streams",
        "reader",
    ]
    files = [core / f"{name}.py" for name in loop]
    files += [*(core / "objective").glob("*.py"), *(core / "distribution").glob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
            name = name or getattr(node, "name", None) or ""
            assert not re.search("token|pixel|image", str(name)), f"{file.name}: {name}"


@pytest.mark.slow
def test_the_student_learns_to_steer(config):
    """Without callbacks; the teacher, who is told the wind, always gets there."""
    path = config("learns")
    path.write_text(re.sub(r"  callbacks:\n(    .*\n)+", "", path.read_text(encoding="utf-8")), encoding="utf-8")
    finish(run(path, "--trainer.max_steps=150", "--trainer.val_check_interval=150", "--model.rollout.max_staleness=0"))
    accuracies = [float(row["val/accuracy"]) for row in metrics(path) if row.get("val/accuracy")]
    assert accuracies[0] < 0.2
    assert accuracies[-1] > 0.7, "and no more: where the wind is strong, only who knows of it gets there"


def test_a_killed_run_goes_on_as_if_nothing_had_been(config, unbroken):
    """With early stop, a curriculum, freshness and rollouts made ahead: the same weights, bit for bit."""
    killed = config("killed")
    process = run(killed)
    process.wait_for(killed.parent / "checkpoints" / "last.ckpt")
    process.kill()
    assert last(killed)["global_step"] < 12
    finish(run(killed, "--ckpt_path=last"))
    states = last(killed), last(unbroken)
    assert states[0]["global_step"] == states[1]["global_step"] == 12
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys() != set()
    for name, weight in states[1]["state_dict"].items():
        assert torch.equal(states[0]["state_dict"][name], weight), name
    # every callback had something to do
    rows = [row for row in metrics(unbroken) if row["knob/rollout.horizon"]]
    horizons, cuts, lags = (
        [float(row[name]) for row in rows if row[name]]
        for name in ("knob/rollout.horizon", "train/early_stop/cut", "train/freshness/lag")
    )
    assert horizons[0] < horizons[-1]
    assert max(cuts) > 0
    assert max(lags) > 0


def test_what_the_glossary_says_of_logs_is_logged(unbroken):
    """But for what a vocabulary alone has, a policy gradient, notes, turns, given texts, teachers elsewhere, `test`."""
    words = (HERE.parents[1] / "docs" / "words.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:train|val|knob|time)/[^`]*)`", words))
    assert len(names) > 15
    logged = metrics(unbroken)[0].keys()
    absent = {"train/loss/PolicyGradient", "train/<name>/privileged_gap", "train/<teacher>/too_long", "val/retention/…"}
    absent |= {"train/<name>/kl_sampled", "train/<name>/note_gap/<note>"}
    absent |= {"train/turns", "train/observed", "train/failures"}
    for name in names - absent:
        pattern = re.sub(r"<\w+>", r"[^/]+", name).replace("…", ".+")
        assert any(re.fullmatch(pattern, column) for column in logged), f"docs/words.md: no run logs {name}"
