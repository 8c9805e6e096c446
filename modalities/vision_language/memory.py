"""The memory that images take, beside that of the text around them: counted in passes of one row, which are made."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...live import NOTHING, Taken, taken
from ...rows import row_of
from ...splits import rows_of
from ...trajectory import Example
from ..autoregressive.findings import LOOKED_AT
from ..autoregressive.memory import Plan
from ..autoregressive.models import bare
from ..autoregressive.passes import body


def with_eyes(module: Any, trainer: Any, plan: Plan) -> Plan:
    """Adds what images take to the plan of a step, by the row with the longest prompt.

    Args:
        module: a setting that sees; where its models are not loaded, the plan says that it leaves images out.
        trainer: of the run.
        plan: of the text alone.
    """
    rows = rows_of(trainer, "train", "the forecast of memory") if module.policies else None
    if not rows:
        return replace(plan, about=f"{plan.about}, without what images take, which takes loaded models to tell")
    # 1. the row as each policy sees it
    examples = [row_of(rows, i) for i in range(min(len(rows), LOOKED_AT))]
    student = module.policies["student"]
    longest = max(examples, key=lambda row: len(module.prompt_ids(module.shown([row])[0], student)))
    views = {name: module.streams.seen(name, [longest])[0] for name in module.policies}
    # 2. what each pass takes
    context = trainer.precision_plugin.forward_context
    eyes = {
        name: _by_images(module, name, view, min(plan.micro, 2), context)
        for name, view in views.items()
        if view is not None
    }
    own, others = eyes.pop("student"), sorted(eyes.values(), key=lambda of_one: of_one.forward)
    pixels = sum(tensor.nbytes for tensor in module.media(module.shown([longest]), student).values())
    return replace(plan, eyes=own, teacher_eyes=(others or [NOTHING])[-1], pixels=float(pixels))


def _by_images(module: Any, name: str, row: Example, rows: int, context: Any) -> Taken:
    """Counts what a row takes in a pass beside the same one without its images; of a teacher, without gradient.

    Args:
        module: the setting.
        name: of the policy.
        row: as the policy sees it.
        rows: 2 where several are read at once: what the second one adds, since a part does not grow with them. Or 1.
        context: in which passes run.
    """
    policy = module.policies[name]
    model, reader = bare(policy.model), module.reads_as(policy)
    device = next(model.parameters()).device

    def counted(rows: int, has_images: bool) -> Taken:
        inputs: dict[str, Tensor] = module.collate([row] * rows, reader)
        if has_images:
            inputs = {**inputs, **module.media([row] * rows, policy)}
        else:
            # placeholders of images may lack a row of embeddings
            ids = torch.zeros_like(inputs["input_ids"])
            inputs = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
        run = partial(body, model, (), use_cache=False, **{key: value.to(device) for key, value in inputs.items()})
        with policy.active():
            return taken(model, run, name == "student", context)

    def beside(rows: int) -> list[float]:
        return [a - b for a, b in zip(counted(rows, True), counted(rows, False), strict=True)]

    less = beside(1) if rows == 2 else [0.0, 0.0, 0.0]
    return Taken(*(max(a - b, 0.0) for a, b in zip(beside(rows), less, strict=True)))
