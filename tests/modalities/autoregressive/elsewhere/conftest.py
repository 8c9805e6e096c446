"""Servers to ask."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.modalities.autoregressive.elsewhere.servers import Imitation, Served, StandIn
from tests.tiny import make_rows


@pytest.fixture(scope="session")
def config(tiny_student, tmp_path_factory) -> Callable[[Any], Any]:
    """Writes a configuration whose teacher is the model of a folder."""

    def write(teacher: Any) -> Any:
        folder = tmp_path_factory.mktemp("config")
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()), encoding="utf-8")
        frozen = {"class_path": "Frozen", "init_args": {"pretrained": {"path": str(teacher)}}}
        arguments = {
            "student": {"path": str(tiny_student)},
            "teachers": {"teacher": {"weights": frozen}},
            "objective": {"terms": [{"signal": "ReverseKL"}]},
        }
        settings = {
            "trainer": {"accelerator": "cpu", "max_steps": 1, "logger": False, "default_root_dir": str(folder)},
            "model": {"class_path": "TextDistillation", "init_args": arguments},
            "data": {"class_path": "PromptData", "init_args": {"train": str(folder / "rows.jsonl")}},
        }
        (folder / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
        return folder / "config.yaml"

    return write


@pytest.fixture(scope="session")
def served(config, tiny_teacher) -> Iterator[Served]:
    server = Served(config(tiny_teacher))
    yield server
    server.process.terminate()
    server.process.join()


@pytest.fixture
def stand_in() -> Iterator[Callable[..., StandIn]]:
    made: list[StandIn] = []

    def make(answer: Callable[[str, Any], tuple[int, Any]]) -> StandIn:
        made.append(StandIn(answer))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def imitation(tiny_teacher) -> Imitation:
    return Imitation(tiny_teacher)
