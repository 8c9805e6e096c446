"""Checkpoints as `opd fit` writes them, of students that no run has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from opd_lightning import export
from opd_lightning.resume import kept_names

TEXT = "opd_lightning.modalities.text.TextDistillation"


def exportable(
    path: Path, base: Path, setting: str = TEXT, seed: int = 0, own: dict[str, Any] | None = None, **student: Any
) -> Path:
    """A checkpoint of a student whose trained weights are not those that it began with.

    Args:
        path: where it is written.
        base: of the student.
        setting: its class.
        seed: of what is added to the weights.
        own: the setting's own arguments.
        **student: as in `Pretrained`.
    """
    arguments = {
        "student": {"path": str(base), **student},
        "objective": {"terms": [{"signal": {"class_path": "opd_lightning.objective.CrossEntropy"}, "teacher": None}]},
        **(own or {}),
    }
    config = {"model": {"class_path": setting, "init_args": arguments}}
    module = export.student_alone(config["model"], trust_remote_code=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.student.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.1 if student.get("lora") else 0.02))
    kept = kept_names(module.student, module.state_dict(), module._student_spec)
    state = {name: tensor for name, tensor in module.state_dict().items() if name in kept}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = {"state_dict": state, "opd_config": yaml.safe_dump(config), "base": module.streams.base, "global_step": 3}
    torch.save(written, path)
    return path
