"""Two ranks do what one rank does with the same global batch (rule 2), and their metrics are reduced."""

from __future__ import annotations

import csv
import json
import os
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd_lightning import DistillationCallback
from opd_lightning.checkpoint_file import is_slices
from opd_lightning.export import write
from opd_lightning.methods.playbook import Playbook
from opd_lightning.slices import read_slices
from tests.processes import finish, last, start
from tests.test_configs import ROOT
from tests.test_resume import PLAIN, PLAYBOOK, configuration

SGD = ["--model.optimizer.class_path=torch.optim.SGD", "--model.optimizer.lr=0.5"]
SHORT = [
    "--trainer.max_steps=1",
    "--model.schedule.warmup_steps=0",
    "--model.schedule.name=constant",
]
TERM = "[{signal: ReverseKL, weights: [TopEntropy], normalizer: weights}]"
MOMENTUM = [*SGD, "--model.optimizer.momentum=0.9"]
LORA = "--model.student.lora={r: 4, alpha: 8}"


def run(folder, world, strategy, steps, *extra, prompts=8, micro_batch=None, ranks=2):
    """Trains up to a step, from the last checkpoint if there is one, with the same global batches on any ranks."""
    ranks = 1 if strategy == "auto" else ranks
    rollout = {"batch_size": prompts // ranks, "horizon": 8, "group_size": 2}
    if micro_batch is not None:
        rollout["micro_batch_size"] = micro_batch // ranks
    config = configuration(folder, world, {"rollout": rollout, "teacher": "ema", "accumulate": 1})
    settings = [f"--trainer.strategy={strategy}", f"--trainer.max_steps={steps}", "--ckpt_path=last"]
    reward = "--model.reward.class_path=ExactMatch"
    return start(config, *MOMENTUM, *SHORT, reward, *extra, *settings, ranks=ranks), config


def products(state: dict) -> dict:
    """What each adapter does, B·A, in place of its factors, which are not unique."""
    found = {name: value for name, value in state.items() if "lora_" not in name}
    for name, value in state.items():
        if "lora_B" in name:
            found[name] = value @ state[name.replace("lora_B", "lora_A")]
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, make_world):
    """What four steps on one rank lead to, with and without LoRA."""

    @cache
    def get(*extra):
        process, config = run(tmp_path_factory.mktemp("unbroken"), make_world("text"), "auto", 4, *extra)
        finish(process)
        return products(last(config)["state_dict"])

    return get


@pytest.mark.parametrize(
    ("strategy", "setting", "terms", "held_out"),
    [
        pytest.param("ddp", "text", None, 1, marks=pytest.mark.slow),
        ("ddp", "text", TERM, 40),
        pytest.param("ddp", "vision_language", None, 5, marks=pytest.mark.slow),
        pytest.param("ddp", "gui_grounding", TERM, 40, marks=pytest.mark.slow),
        ("fsdp2", "text", TERM, 1),
        pytest.param("fsdp2", "vision_language", None, 5, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_and_score_like_one(strategy, setting, terms, held_out, tmp_path, make_world):
    """With the number of trained steps as the normalizer, or a sum of weights over the batch.

    Held-out rows may be too few for a last batch on both ranks, or for any.
    """
    results = {}
    validation = make_world(setting).write(tmp_path, held_out)
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        setup = {**PLAIN, "rollout": {"batch_size": 8 // ranks, "horizon": 8}}
        config = configuration(folder, make_world(setting), setup)
        extra = [
            "--model.reward.class_path=ExactMatch",
            f"--trainer.strategy={'auto' if ranks == 1 else strategy}",
            "--trainer.limit_val_batches=1.0",
            "--trainer.val_check_interval=1",
            f"--data.validation={validation}",
            "--data.validation_batch_size=2",
            "--trainer.logger=null",  # the default one, where the file has none
        ]
        if terms:
            extra.append(f"--model.objective.terms={terms}")
        process = start(config, *SGD, *SHORT, *extra, ranks=ranks)
        finish(process)
        assert "sync_dist" not in process.output, "what is logged is that of all ranks already"
        rows = list(csv.DictReader((folder / "logs" / "version_0" / "metrics.csv").open(encoding="utf-8")))
        results[ranks] = last(config)["state_dict"], {k: float(v) for row in rows for k, v in row.items() if v}

    (one, metrics), (two, metrics_of_two) = results[1], results[2]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for name in ("val/accuracy", "val/length", "val/stopped", "val/teacher/kl_student_teacher", "train/length"):
        assert metrics_of_two[name] == pytest.approx(metrics[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("strategy", "extra"),
    [
        ("fsdp2", [LORA]),
        pytest.param("ddp", [LORA], marks=pytest.mark.slow),
        pytest.param("fsdp2", [], marks=pytest.mark.slow),
        pytest.param("ddp", [], marks=pytest.mark.slow),
    ],
)
def test_adapters_and_averaged_teachers_move_as_on_one_rank(strategy, extra, unbroken, tmp_path, make_world):
    process, config = run(tmp_path, make_world("text"), strategy, 4, *extra)
    finish(process)
    found, expected = products(last(config)["state_dict"]), unbroken(*extra)
    assert found.keys() == expected.keys()
    assert any("teacher" in name for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("before", "after", "extra"),
    [
        ("fsdp2", "auto", [LORA]),
        pytest.param("auto", "fsdp2", [], marks=pytest.mark.slow),
        pytest.param("ddp", "auto", [], marks=pytest.mark.slow),
        pytest.param("fsdp2", "ddp", [LORA], marks=pytest.mark.slow),
        pytest.param("auto", "fsdp2", [LORA], marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_under_another_strategy_and_number_of_ranks(before, after, extra, unbroken, tmp_path, make_world):
    """Momentum, averaged teacher and position carry over, and what comes out can be exported."""
    world = make_world("text")
    finish(run(tmp_path, world, before, 2, *extra)[0])
    process, config = run(tmp_path, world, after, 4, *extra)
    finish(process)
    assert last(config)["global_step"] == 4
    found, expected = products(last(config)["state_dict"]), unbroken(*extra)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)

    write(config.parent / "checkpoints" / "last.ckpt", tmp_path / "exported")
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "exported").named_parameters())
    for name in exported.keys() & {name.removeprefix("student.") for name in expected}:
        assert torch.equal(exported[name], last(config)["state_dict"][f"student.{name}"])


@pytest.mark.parametrize(
    ("strategy", "ranks", "extra"),
    [
        ("auto", 1, [LORA]),
        pytest.param("fsdp2_slices", 3, [], marks=pytest.mark.slow),
        pytest.param("fsdp2", 3, [LORA], marks=pytest.mark.slow),
        pytest.param("ddp", 2, [], marks=pytest.mark.slow),
    ],
)
def test_slices_of_two_ranks_go_on_on_any_number_and_export(strategy, ranks, extra, tmp_path, make_world):
    world, same = make_world("text"), {"prompts": 12}
    process, config = run(tmp_path / "unbroken", world, "auto", 4, *extra, **same)
    finish(process)
    expected = products(last(config)["state_dict"])

    process, config = run(tmp_path / "sliced", world, "fsdp2_slices", 2, *extra, **same)
    finish(process)
    checkpoint = config.parent / "checkpoints" / "last.ckpt"
    assert is_slices(checkpoint)
    assert len(list(checkpoint.glob("*.distcp"))) == 2, "each rank writes its own"
    write(checkpoint, tmp_path / "exported")
    saved = read_slices(checkpoint)["state_dict"]
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "exported").named_parameters())
    names = exported.keys() & {name.removeprefix("student.") for name in saved}
    assert all(torch.equal(exported[name], saved[f"student.{name}"]) for name in names)

    process, config = run(tmp_path / "sliced", world, strategy, 4, *extra, **same, ranks=ranks)
    finish(process)
    state = read_slices(checkpoint) if is_slices(checkpoint) else last(config)
    assert state["global_step"] == 4
    for name, value in expected.items():
        torch.testing.assert_close(products(state["state_dict"])[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_two_copies_of_one_or_two_ranks_each_move_as_one_rank(ranks, tmp_path, make_world):
    copies = "{class_path: opd_lightning.sharding.FSDP2, init_args: {copies: 2}}"
    states = []
    for strategy in ("auto", copies):
        process, config = run(tmp_path / str(len(states)), make_world("text"), strategy, 2, ranks=ranks)
        finish(process)
        states.append(last(config)["state_dict"])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_ranks_with_shorter_rollouts_or_none_keep_pace(tmp_path):
    """Cut weights are gathered by all ranks together: those that replay a completion act with the others all the same,
    and those whose rollouts end early go on until the last one's does."""
    found = {}
    for ranks, strategy in ((1, "auto"), (2, "fsdp2")):
        folder = tmp_path / strategy
        settings = [
            f"--trainer.strategy={strategy}",
            "--trainer.max_steps=6",
            "--trainer.limit_val_batches=0",
            "--trainer.logger=false",
            f"--trainer.default_root_dir={folder}",
            "--data.train_options.count=64",
            "--model.evaluation.before=false",
            f"--model.rollout.batch_size={2 // ranks}",
            "--model.rollout.behavior={student: 0.7, dataset: 0.3}",
        ]
        finish(start(ROOT / "text" / "quickstart.yaml", *SGD, *settings, ranks=ranks))
        found[ranks] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in found[1].items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_two_ranks_predict_each_of_three_examples_once(tmp_path, make_world):
    world = make_world("text")
    process, config = run(tmp_path, world, "auto", 1)
    finish(process)
    three, checkpoint = world.write(tmp_path / "three", 3), tmp_path / "checkpoints" / "last.ckpt"
    prompts = sorted(json.loads(line)["prompt"] for line in three.read_text(encoding="utf-8").splitlines())
    settings = [f"--data.predict={three}", "--data.validation_batch_size=1"]
    for strategy in ("ddp", "fsdp2"):
        folder = tmp_path / strategy
        where = [f"--trainer.strategy={strategy}", f"--trainer.default_root_dir={folder}", f"--ckpt_path={checkpoint}"]
        finish(start(config, *settings, *where, command="predict", ranks=2))
        lines = [
            line
            for file in folder.glob("predictions-*.jsonl")
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
        assert sorted(json.loads(line)["prompt"] for line in lines) == prompts


@pytest.mark.parametrize(("epochs", "before", "steps"), [pytest.param(1, 1, 2, marks=pytest.mark.slow), (2, 3, 4)])
def test_trajectories_that_wait_to_be_trained_are_dealt_to_the_ranks_that_go_on(
    epochs, before, steps, tmp_path, make_world
):
    """A generation batch of two optimizer steps, broken off after the first one of the last time it is trained."""
    world = make_world("text")
    extra = f"--model.rollout.epochs={epochs}"
    process, unbroken = run(tmp_path / "unbroken", world, "ddp", steps, extra, prompts=16, micro_batch=16)
    finish(process)
    finish(run(tmp_path / "broken", world, "ddp", before, extra, prompts=16, micro_batch=16)[0])
    process, broken = run(tmp_path / "broken", world, "auto", steps, extra, prompts=16, micro_batch=16)
    finish(process)
    for name, value in last(unbroken)["state_dict"].items():
        torch.testing.assert_close(last(broken)["state_dict"][name], value, rtol=1e-4, atol=1e-6, msg=name)


class Watched(Playbook):
    """Writes down of each call whose trajectories it was about, and its entries behind it."""

    def __call__(self, module, trajectories):
        noted = super().__call__(module, trajectories)
        with Path(f"{os.environ['WATCHED']}.{os.environ.get('LOCAL_RANK', '0')}").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"seeds": trajectories.seed.tolist(), "entries": self.entries}) + "\n")
        return noted


class KilledBefore(DistillationCallback):
    """Kills every rank before an optimizer step is trained, when the notes of its generation batch are there."""

    def on_optimizer_step_start(self, module, step):
        if os.environ.get("KILLED_BEFORE") == str(module.global_step):
            os.kill(os.getpid(), signal.SIGKILL)


def noted_run(folder, world, ranks, steps, watched, **environment):
    """Trains optimizer steps, of which each generation batch serves two, with a playbook."""
    notes = {"playbook": {**PLAYBOOK["model"]["notes"]["playbook"], "class_path": "tests.test_ranks.Watched"}}
    rollout = {"batch_size": 16 // ranks, "micro_batch_size": 8 // ranks, "horizon": 8}
    setup = {**PLAYBOOK, "rollout": rollout, "accumulate": 1, "model": {**PLAYBOOK["model"], "notes": notes}}
    config = configuration(folder, world, setup)
    settings = [
        f"--trainer.strategy={'auto' if ranks == 1 else 'ddp'}",
        f"--trainer.max_steps={steps}",
        "--trainer.callbacks+=tests.test_ranks.KilledBefore",
        "--ckpt_path=last",
    ]
    environment = {"WATCHED": str(watched), **environment}
    return start(config, *MOMENTUM, *settings, ranks=ranks, environment=environment), config


def calls(watched, rank):
    path = Path(f"{watched}.{rank}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def noted(tmp_path_factory, make_world):
    """What so many steps of two ranks with a playbook lead to, and the calls of each rank."""

    @cache
    def get(steps):
        folder = tmp_path_factory.mktemp("noted")
        process, config = noted_run(folder, make_world("text"), 2, steps, folder / "calls")
        finish(process)
        return last(config), [calls(folder / "calls", rank) for rank in (0, 1)]

    return get


@pytest.mark.slow
@pytest.mark.parametrize(("before", "ranks", "steps", "again"), [(3, 2, 6, 1), (2, 2, 6, 2), (3, 1, 4, 0)])
def test_a_playbook_is_the_same_on_all_ranks_and_survives_a_kill(
    before, ranks, steps, again, noted, tmp_path, make_world
):
    """Before step 3 the checkpoint has trajectories with their notes, of which nothing is written again. Before step 2
    the last one was made in front of the notes, which are written once more, the same. One rank cuts later generation
    batches into other optimizer steps than two do."""
    # 1. two ranks, killed between notes and training
    expected, (of_first, of_second) = noted(steps)
    process, config = noted_run(tmp_path, make_world("text"), 2, steps, tmp_path / "killed", KILLED_BEFORE=str(before))
    assert process.end() != 0
    assert last(config)["global_step"] == before, process.output
    # 2. as many, or one, go on
    process, config = noted_run(tmp_path, make_world("text"), ranks, steps, tmp_path / "resumed")
    finish(process)
    resumed = last(config)
    assert resumed["global_step"] == expected["global_step"] == steps
    for name, value in expected["state_dict"].items():
        if ranks == 2:
            assert torch.equal(resumed["state_dict"][name], value), name
        else:
            torch.testing.assert_close(resumed["state_dict"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    # 3. what was written when, on each rank
    assert [call["entries"] for call in of_first] == [call["entries"] for call in of_second]
    assert of_first[-1]["entries"]
    assert repr(resumed["notes"]) == repr(expected["notes"])
    for rank, unbroken in enumerate((of_first, of_second)):
        assert calls(tmp_path / "killed", rank) == unbroken[:2]
        assert calls(tmp_path / "resumed", rank) == unbroken[len(unbroken) - again :]
