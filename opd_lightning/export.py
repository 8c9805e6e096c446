"""`opd export CKPT DIR`: from a checkpoint to a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from peft import PeftModel

from .module import OnPolicyDistillation


def load_module(checkpoint: str | Path) -> tuple[OnPolicyDistillation, dict[str, Any], int]:
    """The module of a checkpoint with its trained weights, its configuration, and the optimiser steps it has seen.

    Raises:
        ValueError: the checkpoint was not written by ``opd fit``.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if not state.get("opd_config"):
        raise ValueError(f"{checkpoint}: no configuration inside; only checkpoints of `opd fit` can be exported")
    config = yaml.safe_load(state["opd_config"])
    parser = ArgumentParser()
    parser.add_subclass_arguments(OnPolicyDistillation, "model")
    module = parser.instantiate_classes(parser.parse_object({"model": config["model"]})).model
    module.configure_model()
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"], strict=False)
    return module, config, state["global_step"]


def export(arguments: Sequence[str]) -> None:
    """Parses and runs ``opd export CKPT DIR [--merge BOOL]``."""
    parser = ArgumentParser(prog="opd export", description="Write the student as a Hugging Face folder.")
    parser.add_argument("checkpoint", type=str, help="a checkpoint of `opd fit`")
    parser.add_argument("folder", type=str, help="where to write; must not exist or be empty")
    parser.add_argument("--merge", type=bool, default=True, help="fold LoRA into the base (false: adapter only)")
    options = parser.parse_args(list(arguments))
    write(options.checkpoint, options.folder, options.merge)


def write(checkpoint: str | Path, folder: str | Path, merge: bool = True) -> None:
    """
    Raises:
        FileExistsError: the folder holds something already.
        ValueError: adapters over a quantised base are to be merged.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; export into a new folder")
    module, config, steps = load_module(checkpoint)
    spec, model = module._student_spec, module.policies["student"].model
    if isinstance(model, PeftModel):
        for name in [name for name in model.peft_config if name != "default"]:
            model.delete_adapter(name)
        if merge and spec.quantization:
            raise ValueError(
                f"the base is loaded in {spec.quantization}; merging would round the adapter away. "
                "Export it with --merge=false and load it on the base."
            )
        if merge:
            model = model.merge_and_unload()
    module.save_student(model, folder)
    (folder / "README.md").write_text(model_card(module, config, steps), encoding="utf-8")
    print(f"wrote {folder}")


def model_card(module: OnPolicyDistillation, config: dict[str, Any], steps: int) -> str:
    """What was trained from what, with the configuration that reruns it."""
    teachers = "".join(
        f"* teacher `{name}`: {type(teacher.weights).__name__}, {module.policies[name].path}"
        f"{', with a ' + type(teacher.view).__name__ if teacher.view else ''}\n"
        for name, teacher in module.teachers.items()
    )
    terms = "".join(
        f"* {term.coefficient:g} × {type(term.signal).__name__}"
        f"{f' to `{term.teacher}`' if term.teachers else ''}"
        f"{''.join(' × ' + type(weight).__name__ for weight in term.weights)}\n"
        for term in module.objective.terms
    )
    behaviour = ", ".join(f"{name} {share:g}" for name, share in module.rollout.behaviour.items())
    return (
        f"---\nlibrary_name: {module.library}\ntags: [on-policy-distillation]\n"
        f"base_model: {module._student_spec.path}\n---\n\n"
        f"# Student of an on-policy distillation\n\n"
        f"Trained with opd-lightning for {steps} optimiser steps from `{module._student_spec.path}`.\n\n"
        f"## Objective\n\n{terms}{teachers}* who acts: {behaviour}; horizon {module.rollout.horizon}\n\n"
        f"## Configuration\n\n```yaml\n{yaml.safe_dump(config, sort_keys=False)}```\n"
    )
