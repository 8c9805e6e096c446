"""Runs that learn from a model known by its words alone, llama.cpp's server of SmolLM2; numbers: docs/servers.md.

What 135 M parameters say is worth little: it is what a run does with it that is tried here.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from opd_lightning.cli import run
from opd_lightning.connection import client_of
from opd_lightning.endpoint import Endpoint
from opd_lightning.modalities.autoregressive import Judge
from opd_lightning.objective import GroupRelative, Objective, PolicyGradient, Term
from opd_lightning.report import read_curves
from opd_lightning.rollout_settings import Rollout
from opd_lightning.scoring import RewardError
from tests.servers.real import RealServer, llama
from tests.tiny import Rows, make_module, make_rows, make_trainer

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(1800)]


def asked_in(folder: Path) -> list[dict]:
    """What was asked and answered, in the order of the answers."""
    with sqlite3.connect(folder / "answers.sqlite") as base:
        rows = base.execute("SELECT asked, text, cut, read, written FROM answers ORDER BY rowid").fetchall()
    return [
        {
            "form": json.loads(asked)[0].get("response_format", {}).get("json_schema", {}).get("name", "text"),
            "text": text,
        }
        | {"cut": bool(cut), "tokens": read + written}
        for asked, text, cut, read, written in rows
    ]


def test_after_ropd_trains_as_its_overlay_says(llama, tmp_path):
    """Two prompts a step, three rollouts each; of a teacher's text, a rubric and a grade of each rollout."""
    notes, endpoint = "--model.notes", "--model.reward.init_args.endpoint"
    run(
        [
            *("fit", "-c", "opd:text/quickstart.yaml", "-c", "opd:methods/text/ropd.yaml"),
            *(f"{endpoint}.url={llama.url}", f"{endpoint}.keep={tmp_path / 'asked'}"),
            *(f"{endpoint}.timeout=600", f"{endpoint}.deadline=1200", f"{endpoint}.at_once=4"),
            *(f"{notes}.teacher_texts.init_args.count=1", f"{notes}.teacher_texts.init_args.max_tokens=24"),
            *(f"{notes}.rubric.init_args.most=4", f"{notes}.rubric.init_args.max_tokens=400"),
            *("--model.rollout.batch_size=2", "--model.rollout.group_size=3", "--model.evaluation.before=false"),
            *("--data.train_options.count=16", "--trainer.limit_val_batches=0", "--trainer.max_steps=2"),
            *("--trainer.log_every_n_steps=1", f"--trainer.default_root_dir={tmp_path}"),
        ]
    )
    asked, curves = asked_in(tmp_path / "asked"), read_curves(tmp_path)
    for one in asked:
        print(json.dumps(one, ensure_ascii=False)[:600])
    print(
        "tokens", sum(one["tokens"] for one in asked), {name: curve for name, curve in curves.items() if "abst" in name}
    )
    kinds = Counter(one["form"] for one in asked)
    assert kinds["text"] == kinds["Rubric"] == 2 * 2, "one text and one rubric of each prompt"
    # no rubric, no grades: those that were cut can't be read
    readable = 1 - float(sum(value for _, value in curves["train/rubric/unreadable"])) / 2
    assert kinds["Criteria"] <= 2 * 2 * 3 * readable
    assert readable == 0 or kinds["Criteria"] > 0
    assert curves["train/judge/tokens"][-1][1] == sum(one["tokens"] for one in asked)


class KilledAfter(L.Callback):
    """Ends a server's process behind a step, as the out-of-memory killer does; from then on 5 s are waited for it."""

    def __init__(self, server: RealServer, step: int) -> None:
        self.server, self.step = server, step

    def on_train_batch_end(self, trainer, module, *_) -> None:
        if trainer.global_step == self.step:
            self.server.process.kill()
            self.server.process.wait()
            module.reward.endpoint.client = client_of(f"{self.server.url}/v1", "NO_KEY", 5.0, 5.0, 4)


def test_a_judge_dies_in_the_middle_and_the_run_goes_on_with_what_it_had(smollm2, tiny_student, tmp_path):
    def module_of(server):
        endpoint = Endpoint(server.url, keep=str(tmp_path / "asked"), timeout=600.0, deadline=1200.0, at_once=4)
        return make_module(
            tiny_student,
            None,
            Objective([Term(PolicyGradient(GroupRelative()), teacher=None)]),
            reward=Judge(endpoint, max_tokens=48),
            rollout=Rollout(batch_size=1, group_size=4, horizon=6),
        )

    def trained(module, *callbacks, **settings):
        saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_last=True)
        trainer = make_trainer(tmp_path, 3, callbacks=[saving, *callbacks], enable_checkpointing=True)
        trainer.fit(module, datamodule=Rows(make_rows()), **settings)
        return trainer

    # 1. it dies behind the first step
    server = llama(smollm2)
    try:
        with pytest.raises(RewardError, match=r"no answer within 5 s and \d+ tries") as caught:
            trained(module_of(server), KilledAfter(server, 1))
    finally:
        server.stop()
    print(caught.value)
    before = asked_in(tmp_path / "asked")
    # 2. another one is started, and only what was never answered is asked for
    server = llama(smollm2)
    try:
        module = module_of(server)
        trainer = trained(module, ckpt_path=tmp_path / "saved" / "last.ckpt", weights_only=True)
    finally:
        server.stop()
    after = asked_in(tmp_path / "asked")
    print(json.dumps(after), "tokens", sum(one["tokens"] for one in before), sum(one["tokens"] for one in after))
    assert trainer.global_step == 3
    assert after[: len(before)] == before
    assert len(before) < len(after)
