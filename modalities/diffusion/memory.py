"""The memory of one training step of a diffusion model: what a state takes is counted in a pass, the rest by shapes.

States are evaluated chunk by chunk inside the objective, so that activations grow with a chunk and not with their
number. docs/performance.md says how far off it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...forecast import STATE
from ...live import NOTHING, Taken, taken
from ...policy import Policy
from ...rows import row_of
from ...splits import rows_of
from ...trajectory import Example
from .learned_score import LearnedScore
from .query import bytes_per_state, velocity_field

ROWS = 8
"""Rows whose prompts passes are made with."""
RANK = 32
"""Rank of the adapters that memory is computed for where all weights are trained; the default of `Lora`."""


@dataclass(frozen=True)
class Plan:
    """Plan of a step: what decides how much memory it takes. Implements `forecast.Forecast`.

    Attributes:
        weights: bytes of the student and of teachers with weights of their own.
        encoders: bytes of the pipelines' other parts.
        trained: number of weights that are trained.
        of_adapters: the same, if adapters were trained.
        adam: bits of the optimizer's moments.
        student, acting, teacher: what a state takes in a pass that trains, in one of a rollout, and in a teacher's.
        latent: bytes of a state.
        estimate: bytes by which the objective cuts states into chunks.
        rows, micro: trajectories of a generation batch, and of a micro-batch.
        steps: trained ones of a trajectory, at most.
        chunk_mib: of states that are open at once.
        about: what was assumed.
    """

    weights: float
    encoders: float
    trained: int
    of_adapters: int
    adam: int
    student: Taken
    acting: Taken
    teacher: Taken
    latent: float
    estimate: int
    rows: int
    micro: int
    steps: int
    chunk_mib: int
    about: str

    def phases(self) -> dict[str, dict[str, float]]:
        """Computes what lives in each phase of a step, term by term, in bytes; the peak is the largest sum."""
        # 1. what is there all along
        slope = 4.0 * self.trained
        held = {"weights": self.weights, "encoders": self.encoders, "optimizer": STATE[self.adam] * self.trained}
        held["trajectories"] = self.rows * (2 + self.steps) * self.latent
        # 2. the states of a chunk, as `Chunks` cuts them
        states = self.micro * self.steps
        size = max(1, self.chunk_mib * 2**20 // self.estimate)
        chunk = math.ceil(states / math.ceil(states / size))
        # 3. gradients: of micro-batches before, summed over chunks, and of the chunk at work
        before = {"gradients": slope} if self.rows > self.micro else {}
        sums = {"gradients of chunks": 2 * slope}
        activations = max(self.student.forward, self.student.backward) * chunk
        asked = self.student.kept * chunk + self.teacher.forward * chunk
        return {
            "rolling out": held | {"pass": self.acting.forward * self.rows},
            "teacher": held | before | {"gradients of chunks": slope, "activations": asked},
            "student": held | before | sums | {"activations": activations},
            "update": held | {"gradients": slope},
        }

    def cheaper(self) -> Mapping[str, Plan]:
        """Turns the knobs that a configuration has for memory, one at a time."""
        others: dict[str, Plan] = {}
        if self.chunk_mib > 1:
            others[f"model.objective.chunk_mib: {self.chunk_mib // 2}"] = replace(self, chunk_mib=self.chunk_mib // 2)
        if self.of_adapters < self.trained:
            others[f"model.student.lora: {{r: {RANK}, alpha: {2 * RANK}}}"] = replace(
                self, trained=self.of_adapters, weights=self.weights + 4.0 * self.of_adapters
            )
        if self.micro > 1:
            key = f"trainer.accumulate_grad_batches: {2 * self.rows // self.micro} (micro-batches of {self.micro // 2})"
            others[key] = replace(self, micro=self.micro // 2)
        if self.adam > 8:
            others["optimizer: bitsandbytes.optim.AdamW8bit"] = replace(self, adam=8)
        if self.rows > 1:
            half = max(1, self.rows // 2)
            others["half of model.rollout.batch_size"] = replace(self, rows=half, micro=min(self.micro, half))
        return others


class Foreseen:
    """Mixin of what a diffusion setting tells `opd check`."""

    def forecast(self, trainer: Any, device_bytes: float | None) -> Plan | None:
        """Computes memory (`Setting.forecast`); None where no models are loaded, with which passes could be made."""
        module: Any = self
        rows = rows_of(trainer, "train", "the forecast of memory") if module.policies else None
        return plan_of(module, trainer, [row_of(rows, i) for i in range(min(len(rows), ROWS))]) if rows else None


def plan_of(module: Any, trainer: Any, rows: list[Example]) -> Plan:
    """Collects what decides how much memory a step of the configured run takes; makes a few passes.

    Args:
        module: a `DiffusionDistillation` whose models are loaded.
        trainer: of the run.
        rows: examples to make passes of.
    """
    # 1. what a state takes, of those who are asked
    family, policies, context = module.family, module.policies, trainer.precision_plugin.forward_context
    own, student = module.shown(rows), policies["student"]
    jumps = family.jumps if module.flow_map is None else module.flow_map
    views = {name: module.streams.seen(name, rows) for name in policies if name != "student"}

    def of_state(policy: Policy, examples: list[Example], guidance: float, backward: bool) -> Taken:
        field = velocity_field(policy, policy.processor or family, examples, guidance, jumps, lambda states: None)
        return _of_state(policy.model, field, family.latent_shape, len(examples), backward, context)

    guidances = {name: module.velocity_target(name).guidance for name in views}
    of_teachers = [
        of_state(policies[name], [view or row for view, row in zip(of_one, own, strict=True)], guidances[name], False)
        for name, of_one in views.items()
    ]
    # 2. weights, each model once
    models = {id(policy.model): policy.model for policy in policies.values()}
    parts = {id(part): part for f in module._families.values() for part in f.pipe.components.values()}
    encoders = [part for key, part in parts.items() if isinstance(part, nn.Module) and key not in models]
    trained = [weight for weight in student.model.parameters() if weight.requires_grad]
    adapters = [RANK * (m.in_features + m.out_features) for m in student.model.modules() if isinstance(m, nn.Linear)]
    micro, per_generation = module.rollout.micro_batches(trainer.accumulate_grad_batches)
    learned = [name for name, teacher in module.teachers.items() if isinstance(teacher.weights, LearnedScore)]
    left_out = "".join(f" and what {name} learns with" for name in learned)
    plans = [module.sampler.plan(family.levels, module.rollout.horizon, draw) for draw in _draws()]
    steps = max(int(plan.trained.sum()) for plan in plans)
    # a chain of steps is kept as a whole
    chain = max(len(plan.trained) for plan in plans) if module.sampler.chained else 1
    return Plan(
        weights=_bytes(models.values()),
        encoders=_bytes(encoders),
        trained=sum(weight.numel() for weight in trained),
        of_adapters=sum(adapters),
        adam=8 if "8bit" in repr(module._optimizer) else 32,
        student=Taken(*(chain * value for value in of_state(student, own, 1.0, True))),
        acting=of_state(student, own, 1.0, False),
        teacher=max(of_teachers, key=lambda of_one: of_one.forward, default=NOTHING),
        latent=4.0 * math.prod(family.latent_shape),
        estimate=bytes_per_state(family),
        rows=micro * per_generation,
        micro=micro,
        steps=steps,
        chunk_mib=module.objective.chunk_mib,
        about=f"{micro * per_generation} rows of up to {steps} trained steps, {micro} at once; without images of "
        f"validations{left_out}",
    )


def _of_state(model: nn.Module, field: Any, shape: Any, count: int, backward: bool, context: Any) -> Taken:
    """Counts what one more state takes in a pass, from passes of one and of several."""
    device = next(model.parameters()).device

    def run(states: int) -> torch.Tensor:
        latent = torch.zeros(states, *shape, device=device)
        t = torch.full((states,), 0.5, dtype=torch.float64, device=device)
        value: torch.Tensor = field(torch.arange(states) % count, latent, t, torch.zeros_like(t))
        return value

    one, several = (taken(model, partial(run, n), backward, context) for n in (1, 5))
    return Taken(*((b - a) / 4 for a, b in zip(one, several, strict=True)))


def _bytes(modules: Any) -> float:
    return float(sum(weight.nbytes for module in modules for weight in module.parameters()))


def _draws() -> list[torch.Generator]:
    """Makes generators for plans that are drawn, the longest of which counts."""
    return [torch.Generator().manual_seed(seed) for seed in range(32)]
