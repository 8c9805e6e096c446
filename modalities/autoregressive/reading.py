"""Reading: hidden states of a policy at every step of trajectories, in as few forward passes as possible.

Shape legend: B trajectories, T steps, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...objective import Objective
from ...policy import Policy, evaluating
from ...sharding import as_forward, is_sharded
from ...trajectory import Example, Trajectories
from .engines.row_groups import check_dynamic
from .engines.trial import shares_prefixes
from .flops import Counter
from .models import READ, bare, depth
from .passes import at_steps, last_trained, left_align, pass_limits, read
from .prefix import Prefix, read_rows, shared_prefixes
from .writing import Writing


class Reading(Writing, Protocol):
    """Interface of a setting whose policies read."""

    pass_tokens: int | None
    objective: Objective

    def counter(self, policy: Policy) -> Counter: ...
    def shown(self, examples: list[Example], settings: dict[str, Any] | None = None) -> list[Example]: ...
    def collate(self, examples: list[Example], policy: Policy) -> dict[str, Tensor]: ...
    def continued(self, prompts: dict[str, Tensor], trajectories: Trajectories, device: Any) -> dict[str, Tensor]: ...


def hidden_states(
    module: Reading,
    policy: Policy,
    trajectories: Trajectories,
    view: list[Example] | None = None,
    layers: Sequence[int] = (),
    media: dict[str, Tensor] | None = None,
) -> list[Tensor]:
    """Computes hidden states ``[B, T, H]``: those that the head reads, then those of layers.

    Args:
        module: the setting.
        policy: who reads.
        trajectories: what it reads.
        view: the examples as it reads them; None: as the student does.
        layers: as transformers numbers them.
        media: what it reads besides tokens; None: what the setting makes of the examples.
    """
    # 1. rows as the policy reads them
    model = bare(policy.model)
    device, steps = next(model.parameters()).device, trajectories.mask.shape[1]
    if view is None:
        prompts = trajectories.observation
        examples = module.shown(trajectories.examples, trajectories.student_view)
    else:
        prompts, examples = module.collate(view, module.reads_as(policy)), view
    if (observed := trajectories.visible) is not None:
        examples = [module.observing(policy, *pair) for pair in zip(examples, observed, strict=True)]
    prompts = {name: tensor.to(device) for name, tensor in prompts.items()}
    media = module.media(examples, policy) if media is None else media
    media = {name: tensor.to(device) for name, tensor in media.items()}
    inputs = left_align(module.continued(prompts, trajectories, device)) | media
    last = prompts["attention_mask"].sum(1) - 1  # the column of a prompt's last token, once left-aligned
    length = last.cpu() + 1 + last_trained(trajectories).cpu()
    check_dynamic(policy, model, int(length.max()))
    if is_text := inputs.keys() == READ:
        # no token sees those behind it, so padding needs no mask, with which attention would be slower
        del inputs["attention_mask"]
    counter = module.counter(policy)
    # 2. hidden states; the distribution of step t comes from the column before it
    prefix, (most, cost) = Prefix(torch.arange(len(length))), pass_limits(device, module.pass_tokens)
    if is_text:
        prefix = shared_prefixes(inputs["input_ids"].cpu(), last.cpu(), cost)
    if prefix.longer and not shares_prefixes(policy, module.head(policy)):  # asked last: the first time it is a trial
        prefix = Prefix(prefix.rows)
    with policy.active():
        if media or is_sharded(model):
            # media belong to the batch as a whole, and ranks that share weights must make equally many passes
            passes = iter([(prefix.rows, 0, read(model, inputs, layers))])
        else:
            passes = read_rows(model, inputs, length, prefix, most, cost, layers)
        hidden = at_steps(counter.passes(length, prefix, passes), last, steps)
    counter.head(trajectories)
    # layers are side by side, so that they are gathered in one go
    return list(hidden.chunk(1 + len(layers), -1))


@torch.no_grad()
def check_layers(module: Reading) -> None:
    """Checks that student and teachers have the hidden states which parts of the objective read.

    Raises:
        ValueError: a layer is not there, widths or the number of layers differ and nothing says what goes with what, or
            a model does not show its layers.
    """
    for i, term in enumerate(module.objective.terms):
        for part in [part for part in term.parts() if part.layers]:
            assert term.teacher is not None  # `Objective.check` saw to it
            where = f"objective.terms[{i}].signal ({type(part).__name__})"
            student, teacher = _shape(module, "student"), _shape(module, term.teacher)
            if part.layers == "all":
                if student[0] != teacher[0]:
                    raise ValueError(
                        f"{where}.layers: the student has {student[0]} layers and {term.teacher!r} {teacher[0]}; say "
                        f"which goes with which, such as {{1: 1, {student[0]}: {teacher[0]}}}"
                    )
            else:
                for side, shape, numbers in (
                    ("the student", student, part.layers),
                    (repr(term.teacher), teacher, part.layers.values()),
                ):
                    if beyond := [number for number in numbers if not -shape[0] - 1 <= number <= shape[0]]:
                        raise ValueError(f"{where}.layers: {side} has layers 1 to {shape[0]}, not {beyond[0]}")
            if (part.widths or (student[1],) * 2) != (student[1], teacher[1]):
                raise ValueError(
                    f"{where}.widths is {part.widths}: hidden states of the student are {student[1]} wide, those of "
                    f"{term.teacher!r} {teacher[1]}"
                    + ("" if part.widths else f"; widths: [{student[1]}, {teacher[1]}] projects the student's")
                )


def _shape(module: Reading, name: str) -> tuple[int, int]:
    """Returns depth and width of a policy's text model, by a trial of a few ids."""
    policy = module.policies[name]
    model = bare(policy.model)
    ids = torch.arange(min(4, module.vocabulary), device=next(model.parameters()).device)[None]
    with policy.active(), evaluating(model):
        output = as_forward(model, lambda: model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True))
    states = getattr(output, "hidden_states", None)
    if states is None or len(states) != depth(policy) + 1 or not torch.equal(states[-1], output[0]):
        raise ValueError(f"{policy.path}: {type(model).__name__} does not show the hidden states of its layers")
    return depth(policy), int(output[0].shape[-1])
