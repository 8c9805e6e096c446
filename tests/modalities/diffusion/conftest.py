from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.modalities.diffusion import DiffusionDistillation, VelocityMatching
from opd_lightning.objective import Objective, Term
from opd_lightning.pretrained import Pretrained
from opd_lightning.rollout_settings import Rollout
from tests import tiny
from tests.tiny_diffusion import PIPELINES, save_pipeline


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Callable[..., Path]:
    """The folder of a tiny pipeline; the same arguments give the same one."""
    made: dict[Any, Path] = {}

    def get(kind: str, seed: int = 1, width: int = 16) -> Path:
        key = kind, seed, width
        if key not in made:
            made[key] = save_pipeline(tmp_path_factory.mktemp(kind), kind, seed, width)
        return made[key]

    return get


@pytest.fixture(scope="session")
def make(pipeline) -> Callable[..., Any]:
    """A module of a family; unless told otherwise its teacher is another, wider pipeline."""

    def get(kind: str = "anyflow", teacher: Any = None, signal: Any = None, **settings: Any) -> Any:
        # nothing of a step without references reaches what reads them
        freeze = settings.pop("freeze", "image_embedder" if kind == "anyflow" else None)
        student = Pretrained(str(pipeline(kind)), freeze=freeze, lora=settings.pop("lora", None))
        objective = settings.pop("objective", None) or Objective([Term(signal or VelocityMatching())])
        rollout = settings.pop("rollout", None) or Rollout(batch_size=4, horizon=3)
        sizes = {"height": 16, "width": 16, "max_sequence_length": 16} | settings
        if teacher is None:
            teacher = pipeline(kind, 2, 32)
        return tiny.make_module(student, teacher, objective, DiffusionDistillation, rollout=rollout, **sizes)

    return get


@pytest.fixture(scope="session", params=sorted(PIPELINES))
def kind(request) -> str:
    return request.param
