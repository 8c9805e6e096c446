"""Likeness of models at a few inputs: a teacher that begins as the student, an exported student."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from .policy import Policy
from .pretrained import Pretrained
from .sharding import numbers_at
from .teacher import Elsewhere, Teacher

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far apart two ways to the same numbers may come, in units of their spread; what is wrong comes much further."""


def distance(one: Tensor, other: Tensor) -> float:
    """Computes the root mean square difference in units of the spread of ``other``.

    Infinite where they can't be compared (other shapes, or no numbers)."""
    if one.shape != other.shape:
        return float("inf")
    apart = float((one.float() - other.float()).square().mean().sqrt() / other.float().std())
    return apart if apart == apart else float("inf")  # NaN equals nothing


def tolerance(*models: nn.Module) -> float:
    """Returns the tolerance of the coarsest dtype that any of the models computes in; for quantized ones 16 bits."""
    dtypes = {p.dtype if p.is_floating_point() else torch.bfloat16 for model in models for p in model.parameters()}
    return max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes | {torch.float32})


def fingerprint(model: nn.Module, names: Container[str] | None = None) -> str:
    """Computes a fingerprint of the base's weights: 64 numbers of each in 16 bits; of a sharded one every rank asks.

    Another model of the same shapes has another one. Adapters are left out, and so are quantized weights, which other
    machines may round in another way. ``names``: parameters that count. Default: all."""
    digest = hashlib.sha256()
    adapted = isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if names is not None and name not in names:
            continue
        if parameter.is_floating_point() and not (adapted and parameter.requires_grad):
            places = torch.arange(parameter.numel())[:: max(1, parameter.numel() // 64)][:64]
            digest.update(name.encode())
            # float() because numpy has no bfloat16
            digest.update(numbers_at(parameter.detach(), places).bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_base(spec: Pretrained, base: str, checkpoint: dict[str, Any], fits: bool) -> None:
    """Compares the base with the one that a checkpoint was trained from.

    Args:
        spec: what the student was loaded from.
        base: the fingerprint of its weights, or "drawn".
        checkpoint: has that of the run that wrote it.
        fits: whether that run goes on.

    Raises:
        ValueError: the run that wrote the checkpoint began with other weights than those that are there, where they
            matter: beneath adapters, and for a run that goes on (what its record says, and the teacher `Initial`).
    """
    kept = checkpoint.get("base")
    if (spec.lora is not None or fits) and kept not in (None, base):
        what = "the adapter in the checkpoint was trained on" if spec.lora else "the run of the checkpoint began with"
        if "drawn" in (kept, base):
            raise ValueError(
                f"model.student.random_init is now {spec.random_init}: other weights than those that {what}"
            )
        raise ValueError(f"model.student.path: {spec.path} holds other weights now than those that {what}")


def check_elsewhere(
    marks: Mapping[str, str], weights: Mapping[str, Elsewhere], checkpoint: dict[str, Any], fits: bool
) -> None:
    """Compares the weights of teachers that are elsewhere with those that a checkpoint was trained with.

    Args:
        marks: their fingerprints, by name.
        weights: what compares fingerprints, by name.
        checkpoint: has those of the run that wrote it.
        fits: whether that run goes on.

    Raises:
        ValueError: a run would go on with another teacher.
    """
    then = checkpoint.get("teachers", {})
    for name, now in marks.items() if fits else ():
        if name in then and not weights[name].same(now, then[name]):
            raise ValueError(
                f"model.teachers.{name}: the checkpoint was trained with the weights {then[name]}, and those that "
                f"answer now are {now}; serve or record the former again, or begin a new run"
            )


UNKNOWN = "unknown"
"""Beginning of fingerprints of weights that a server does not tell apart."""
TAUGHT_BY = "opd.json"
"""File of an exported student, with the fingerprints of the teachers that it had."""


def taught_by(folder: str) -> set[str]:
    """Reads the fingerprints of the teachers of an exported student; empty where nobody wrote them down."""
    path = Path(folder, TAUGHT_BY)
    known = json.loads(path.read_text(encoding="utf-8"))["teachers"].values() if path.is_file() else ()
    return {mark for mark in known if not mark.startswith(UNKNOWN)}


def check_self_teachers(
    teachers: Mapping[str, Teacher], policies: Mapping[str, Policy], probe: Callable[[Policy], Tensor | None]
) -> None:
    """Compares teachers that begin as the student with the student.

    Args:
        teachers: by name.
        policies: of the student and the teachers.
        probe: what a policy says to a few fixed inputs (`Portable.probe`).

    Raises:
        RuntimeError: a teacher that should begin as the student says something else.
    """
    student = policies["student"]
    named = [name for name, teacher in teachers.items() if teacher.weights.starts_as_student]
    outputs = probe(student) if named else None
    for name in named if outputs is not None else ():
        apart = distance(probe(policies[name]), outputs)  # type: ignore[arg-type]
        if apart > tolerance(student.model, policies[name].model):
            raise RuntimeError(
                f"model.teachers.{name}: {type(teachers[name].weights).__name__} should begin as the student, "
                f"but the two are {apart:.2g} of the spread of what they say apart: does the student train something "
                "that an adapter does not switch?"
            )
