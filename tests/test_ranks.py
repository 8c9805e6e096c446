"""Two ranks do what one rank does with the same global batch (rule 2), and their metrics are reduced."""

from __future__ import annotations

import csv

import pytest
import torch

from tests.test_resume import PLAIN, configuration, finish, last, start

SGD = ["--model.init_args.optimizer.class_path=torch.optim.SGD", "--model.init_args.optimizer.init_args.lr=0.5"]
SHORT = [
    "--trainer.max_steps=1",
    "--model.init_args.schedule.warmup_steps=0",
    "--model.init_args.schedule.name=constant",
]
TERM = "[{signal: {class_path: ReverseKL}, weights: [{class_path: TopEntropy}], normaliser: weights}]"


@pytest.mark.parametrize(
    ("strategy", "setting", "terms"),
    [
        ("ddp", "text", None),
        ("ddp", "text", TERM),
        ("ddp", "vision_language", None),
        ("ddp", "gui_grounding", TERM),
        ("fsdp2", "text", TERM),
        ("fsdp2", "vision_language", None),
    ],
)
def test_two_ranks_train_and_score_like_one(strategy, setting, terms, tmp_path, make_world):
    """With the number of trained steps as the normaliser, or a sum of weights over the batch."""
    results = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        setup = {**PLAIN, "rollout": {"batch_size": 8 // ranks, "horizon": 8}}
        config = configuration(folder, make_world(setting), setup)
        extra = [
            "--model.init_args.reward.class_path=ExactMatch",
            f"--trainer.devices={ranks}",
            f"--trainer.strategy={'auto' if ranks == 1 else strategy}",
            "--trainer.limit_val_batches=1.0",
            "--trainer.val_check_interval=1",
            "--trainer.check_val_every_n_epoch=null",
            f"--data.init_args.validation={folder / 'data' / 'rows.jsonl'}",
            "--trainer.logger.class_path=lightning.pytorch.loggers.CSVLogger",
            f"--trainer.logger.init_args.save_dir={folder}",
            "--trainer.logger.init_args.name=logs",
        ]
        if terms:
            extra.append(f"--model.init_args.objective.terms={terms}")
        finish(start(config, *SGD, *SHORT, *extra))
        rows = list(csv.DictReader((folder / "logs" / "version_0" / "metrics.csv").open()))
        results[ranks] = last(config)["state_dict"], {k: float(v) for row in rows for k, v in row.items() if v}

    (one, metrics), (two, metrics_of_two) = results[1], results[2]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for name in ("val/accuracy", "val/length", "val/stopped", "val/teacher/kl_student_teacher", "train/length"):
        assert metrics_of_two[name] == pytest.approx(metrics[name], rel=1e-4), name


@pytest.mark.parametrize("lora", [None, "{r: 4, alpha: 8}"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_adapters_and_averaged_teachers_move_as_on_one_rank(strategy, lora, tmp_path, make_world):
    results = {}
    for ranks in (1, 2):
        setup = {"rollout": {"batch_size": 8 // ranks, "horizon": 8}, "teacher": "ema", "accumulate": 1}
        config = configuration(tmp_path / str(ranks), make_world("text"), setup)
        extra = [f"--trainer.devices={ranks}", f"--trainer.strategy={'auto' if ranks == 1 else strategy}"]
        if lora:
            extra.append(f"--model.init_args.student.lora={lora}")
        finish(start(config, *SGD, *SHORT, *extra, "--trainer.max_steps=2"))
        results[ranks] = products(last(config)["state_dict"])
    assert results[1].keys() == results[2].keys()
    assert any("teacher" in name for name in results[1])
    for name, value in results[1].items():
        torch.testing.assert_close(results[2][name], value, rtol=1e-4, atol=1e-6, msg=name)


def products(state: dict) -> dict:
    """What each adapter does, B·A, in place of its factors, which are not unique."""
    found = {name: value for name, value in state.items() if "lora_" not in name}
    for name, value in state.items():
        if "lora_B" in name:
            found[name] = value @ state[name.replace("lora_B", "lora_A")]
    return found
