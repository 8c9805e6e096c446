"""Checkpoints of strangers execute nothing, and model cards tell nothing but what they should."""

from __future__ import annotations

import http.server
import json
import shutil
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from opd_lightning import export
from opd_lightning.checkpoint_file import AtomicIO
from opd_lightning.model_card import known_as, model_card
from opd_lightning.statement import Statement
from tests.exported import exportable

NAMED = {"class_path": "stranger.Thing", "init_args": {"function": "stranger.thing"}}


@pytest.fixture
def stranger(tmp_path, monkeypatch) -> Path:
    """A file that is there once a module of theirs, which is where Python looks, is imported."""
    executed = tmp_path / "executed"
    (tmp_path / "stranger.py").write_text(
        f"open({str(executed)!r}, 'w')\nclass Thing: pass\ndef thing(*_): return 1.0\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield executed
    sys.modules.pop("stranger", None)


def changed(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The same checkpoint with another configuration inside."""
    state = torch.load(checkpoint, weights_only=True)
    config = yaml.safe_load(state["opd_config"])
    change(config)
    torch.save({**state, "opd_config": yaml.safe_dump(config)}, checkpoint)
    return checkpoint


@pytest.mark.parametrize(
    "part", ["reward", "engine", "optimizer", "student_view", "evaluation", "teachers", "rollout", "schedule"]
)
def test_what_a_configuration_names_besides_the_student_is_not_imported(part, stranger, tiny_student, tmp_path):
    checkpoint = exportable(tmp_path / "x.ckpt", tiny_student)
    value = {"t": {"weights": NAMED, "view": NAMED}} if part == "teachers" else NAMED

    def name(config: dict[str, Any]) -> None:
        config["model"]["init_args"][part] = value
        config["data"] = config["callbacks"] = NAMED

    export.write(changed(checkpoint, name), tmp_path / "out")
    assert not stranger.exists()


def test_classes_in_the_place_of_a_student_or_a_setting_are_not_imported(stranger, tiny_student, tmp_path):
    def student(config: dict[str, Any]) -> None:
        config["model"]["init_args"]["student"]["lora"] = NAMED

    checkpoint = exportable(tmp_path / "x.ckpt", tiny_student)
    with pytest.raises(ValueError, match="the checkpoint names classes where plain values belong"):
        export.write(changed(checkpoint, student), tmp_path / "out")
    for setting, message in (
        ("stranger.Thing", "asks for the setting stranger.Thing to be run"),
        ("opd_lightning.cli.run", "was written by opd_lightning.cli.run, which is no setting"),
    ):
        checkpoint = exportable(tmp_path / "x.ckpt", tiny_student)
        with pytest.raises(ValueError, match=message):
            export.write(changed(checkpoint, lambda c, s=setting: c["model"].update(class_path=s)), tmp_path / "out")
    assert not stranger.exists()
    assert not (tmp_path / "out").exists()


def test_code_that_comes_with_a_base_is_run_with_a_flag_only(tiny_student, tmp_path):
    base = shutil.copytree(tiny_student, tmp_path / "base")
    checkpoint = exportable(tmp_path / "x.ckpt", base, trust_remote_code=True)
    executed = tmp_path / "executed"
    (base / "code.py").write_text(
        f"open({str(executed)!r}, 'w')\nfrom transformers import Qwen3Config as C, Qwen3ForCausalLM as M\n",
        encoding="utf-8",
    )
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    own = {"model_type": "strange", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (base / "config.json").write_text(json.dumps(config | own), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"asks for Python code that comes with its base to be run; .*trust_remote_code=t"
    ):
        export.write(checkpoint, tmp_path / "out")
    assert not executed.exists()


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


@pytest.fixture
def evil(tmp_path, tiny_student) -> tuple[Path, Path]:
    """A checkpoint that makes a file when it is unpickled, and that file."""
    checkpoint = exportable(tmp_path / "evil.ckpt", tiny_student)
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "x": Evil(tmp_path / "executed")}, checkpoint)
    return checkpoint, tmp_path / "executed"


def test_a_checkpoint_is_never_unpickled(evil, tmp_path):
    checkpoint, executed = evil
    with pytest.raises(ValueError, match="holds something else than tensors, numbers and text, which could run code"):
        export.write(checkpoint, tmp_path / "out")
    with pytest.raises(ValueError, match="checkpoints are read from files only; download it first"):
        export.write("https://example.com/x.ckpt", tmp_path / "out")
    assert not executed.exists()


def test_not_even_one_from_a_url(evil, tmp_path, monkeypatch):
    """Lightning's own loads those with ``weights_only=False``."""
    checkpoint, executed = evil
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/{checkpoint.name}"
        for weights_only in (None, False):
            with pytest.raises(Exception, match=r"Unsupported|unsupported|weights_only"):
                AtomicIO().load_checkpoint(url, weights_only=weights_only)
        server.shutdown()
    assert not executed.exists()


SECRET = "hf_SECRET"


def test_a_card_is_made_of_what_may_be_shown(tmp_path):
    """Everything else in a configuration may be a key, an address, or somebody's name."""
    home = tmp_path / "alice" / "student"
    home.mkdir(parents=True)
    view = {"class_path": "opd_lightning.modalities.autoregressive.PromptView", "init_args": {"prompt": SECRET}}
    own = {"class_path": "mine.View", "init_args": {"api_key": SECRET, "port": 4711}}
    config = {
        "seed_everything": 3,
        "trainer": {
            "max_steps": 9,
            "precision": "bf16-mixed",
            "default_root_dir": str(home),
            "logger": {"key": SECRET},
        },
        "data": {"class_path": "PromptData", "init_args": {"train": "python:rows", "train_options": {"key": SECRET}}},
        "model": {
            "class_path": "opd_lightning.modalities.text.TextDistillation",
            "init_args": {
                "student": {"path": str(home), "lora": {"r": 4, "adapter": str(home)}, "revision": SECRET},
                "teachers": {
                    "wise": {
                        "weights": {
                            "class_path": "opd_lightning.teacher.Frozen",
                            "init_args": {"pretrained": {"path": f"/home/alice/{SECRET}/big", "dtype": "bfloat16"}},
                        },
                        "view": view,
                        "where": {"task": SECRET},
                    },
                    "own": {
                        "weights": {"class_path": "opd_lightning.teacher.EMA", "init_args": {"rate": "1e-2"}},
                        "view": own,
                    },
                },
                "objective": {
                    "terms": [
                        {
                            "signal": {"class_path": "opd_lightning.objective.ReverseKL"},
                            "teacher": "wise",
                            "coefficient": 0.5,
                            "weights": [{"class_path": "opd_lightning.objective.Constant", "init_args": {"value": 2}}],
                        }
                    ]
                },
                "rollout": {"horizon": 12, "behavior": {"student": 0.75, "wise": 0.25}},
                "reward": {"class_path": "mine.Judge", "init_args": {"url": SECRET}},
                "engine": {
                    "class_path": "opd_lightning.modalities.autoregressive.VllmServer",
                    "init_args": {"url": SECRET},
                },
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": "1e-05"}},
            },
        },
    }
    card = model_card(config, Statement(7, 0, []), "transformers", "text-generation")
    for hidden in (SECRET, "alice", "4711", "python:rows", str(tmp_path)):
        assert hidden not in card
    for shown in (
        "for 7 optimizer steps from `student`",
        "* 0.5 × ReverseKL to `wise` × Constant",
        "* teacher `wise`: Frozen, big, with a PromptView",
        "* teacher `own`: EMA, with a View",
        "* who acts: student 0.75, wise 0.25; horizon 12",
        "max_steps: 9",
        "precision: bf16-mixed",
        "lr: 1.0e-05",
        "rate: 0.01",
        "r: 4",
        "dtype: bfloat16",
    ):
        assert shown in card
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "base_model": "student"}
    assert yaml.safe_load(card.split("---")[1]) == {**head, "tags": ["on-policy-distillation"]}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("gpt2", "gpt2"),
        ("opd:assets/quickstart/student", "opd:assets/quickstart/student"),
        ("/home/alice/models/mine/", "mine"),
        ("~/mine", "mine"),
        ("../alice/mine", "mine"),
        ("alice/runs/mine", "mine"),
        ("C:\\Users\\alice\\mine", "mine"),
    ],
)
def test_models_are_called_by_what_others_know_them_by(path, name):
    assert known_as(path) == name
