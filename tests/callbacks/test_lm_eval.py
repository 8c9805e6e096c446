"""The harness scores the live student as it scores the exported one, and moves nothing of the run."""

from __future__ import annotations

import builtins
import csv
import json
from importlib.util import find_spec

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from opd_lightning.callbacks import LMEval
from opd_lightning.callbacks.lm_eval import named
from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.export import write
from opd_lightning.modalities.autoregressive.serve import load
from opd_lightning.pretrained import Lora
from tests.callbacks import toy
from tests.exported import exportable

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="extra eval")


@pytest.fixture
def tasks(tmp_path):
    """A multiple choice, and a task in which something is written; neither needs a network."""
    rows = [{"question": f"{i}+{i}=", "choices": [str(2 * i), "9"], "label": 0, "answer": str(2 * i)} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    closed = {"task": "closed", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    closed |= {"doc_to_target": "{{label}}", "metric_list": [{"metric": "acc"}, {"metric": "brier_score"}]}
    written = {"task": "written", "output_type": "generate_until", "doc_to_target": "{{answer}}"}
    written |= {"generation_kwargs": {"until": ["#"], "max_gen_toks": 6}}
    written["metric_list"] = [{"metric": "exact_match"}, {"metric": "chrf"}]
    paths = []
    for task in (closed, written):
        path = tmp_path / f"{task['task']}.yaml"
        path.write_text(yaml.safe_dump(common | task), encoding="utf-8")
        paths.append(str(path))
    return paths


def rewarded(module, path, count: int) -> None:
    """Makes what the student writes, greedily, right in some rows."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    settings = {"do_sample": False, "max_new_tokens": 6, **module.generation_settings()}
    for row in rows[:count]:
        ids = module.tokenizer()(row["question"], return_tensors="pt")["input_ids"]
        new = module.policies["student"].model.generate(input_ids=ids, **settings)[0, ids.shape[1] :]
        row["answer"] = module.written_as(new.tolist()).partition("#")[0]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def logged(folder) -> dict[int, dict[str, float]]:
    (table,) = folder.rglob("metrics.csv")
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    values: dict[int, dict[str, float]] = {}
    for row in rows:
        own = {name: float(value) for name, value in row.items() if name.startswith("val/lm_eval/") and value}
        values.setdefault(int(row["step"]), {}).update(own)
    return {step: own for step, own in values.items() if own}


@needs_harness
def test_a_live_student_scores_as_the_exported_one_does(tasks, tmp_path, make_world, capsys):
    from lm_eval import simple_evaluate

    world = make_world("text")
    exportable(tmp_path / "run" / "checkpoints" / "last.ckpt", world.student, lora={"r": 4, "alpha": 8})
    module = load(str(tmp_path / "run"), "cpu")
    rewarded(module, tmp_path / "rows.jsonl", 3)
    callback = LMEval(tasks, every=1)
    from lm_eval.tasks import TaskManager

    callback._manager = TaskManager()
    live = callback.measured(module)
    write(tmp_path / "run", tmp_path / "student")
    exported = simple_evaluate(
        "hf",
        model_args={"pretrained": str(tmp_path / "student"), "dtype": "float32"},
        tasks=tasks,
        batch_size=8,
        device="cpu",
        log_samples=False,
        bootstrap_iters=0,
    )
    wanted = {f"val/lm_eval/{t}/{n}": v for t, own in exported["results"].items() for n, v in named(own).items()}
    with capsys.disabled():
        print("\nlive    ", live, "\nexported", wanted)
    assert live == pytest.approx(wanted, abs=1e-6)
    assert live["val/lm_eval/written/exact_match"] == pytest.approx(0.6)
    assert live.keys() >= {
        "val/lm_eval/closed/acc",
        "val/lm_eval/closed/brier_score",
        "val/lm_eval/written/exact_match",
    }


@needs_harness
def test_it_is_logged_and_moves_nothing(tasks, tmp_path, make_world):
    world, weights = make_world("text"), []
    for name, callbacks in (("plain", []), ("scored", [LMEval(tasks, every=2, limit=3)])):
        torch.manual_seed(0)
        module = world.module(lora=Lora(r=4, alpha=8, dropout=0.5), evaluation=Evaluation(before=False))
        folder = tmp_path / name
        world.fit(module, folder, steps=4, callbacks=callbacks, logger=CSVLogger(folder, version=0))
        trained = [weight.detach().flatten() for weight in module.student.parameters() if weight.requires_grad]
        weights.append(torch.cat([*trained, torch.rand(3)]))
    assert torch.equal(*weights)
    values = logged(tmp_path / "scored")
    assert sorted(values) == [0, 2, 4]
    assert module.trainer.callback_metrics["val/lm_eval/closed/acc"] == pytest.approx(
        values[4]["val/lm_eval/closed/acc"]
    )


@needs_harness
def test_what_cannot_be_scored_is_refused_at_the_start(tasks, tmp_path, make_world):
    world = make_world("text")
    with pytest.raises(ValueError, match=r"LMEval\.tasks: no_such_task can't be loaded"):
        world.fit(world.module(), tmp_path, callbacks=[LMEval(["no_such_task"], every=1)])
    with pytest.raises(ValueError, match="Moves trains none that writes text"):
        toy.fit(toy.make_module(), tmp_path, [LMEval(tasks, every=1)])


def test_a_missing_harness_is_named(monkeypatch, make_world, tmp_path):
    own = builtins.__import__

    def without(name, *arguments):
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError(name)
        return own(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    world = make_world("text")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'opd-lightning\[eval\]'"):
        world.fit(world.module(), tmp_path, callbacks=[LMEval(["closed"], every=1)])


def test_settings_out_of_range_are_named():
    for settings, problem in (({"tasks": []}, "names none"), ({"every": 0}, "every"), ({"limit": 0}, "limit")):
        with pytest.raises(ValueError, match=problem):
            LMEval(**{"tasks": ["closed"], "every": 1} | settings)


def test_names_leave_out_errors_and_texts():
    metrics = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A", "em,strict": 1, "sample_len": 3}
    assert named(metrics) == {"acc": 0.5, "em/strict": 1.0}
