"""DiffusionDistillation: few-step flow-matching models, distilled on the states that their own sampler visits.

Shape legend: B trajectories, T denoising steps, n states of a chunk, latents ``[...]`` in the family's layout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from peft import PeftModel
from torch import Tensor

from ...distribution import Lazy
from ...module import OnPolicyDistillation
from ...objective import Objective
from ...policy import Policy
from ...pretrained import Pretrained
from ...rollout_settings import Rollout
from ...trajectory import Example, Trajectories
from . import flow
from .checks import (
    check_densities,
    check_finite,
    check_latents,
    check_rollout,
    check_source,
    check_targets,
    problem_with_row,
)
from .families import Family, load_family
from .images import picture
from .memory import Foreseen
from .models import Transformer, diffusers, save_adapter, save_pipeline, with_adapter
from .quality import SampleQuality
from .query import RestrictedField, VelocityField, VisitedStates, bytes_per_state, velocity_field
from .sampler import Euler, Noising, Sampler, Transition, generator, plan_all, roll_out
from .table import pictures
from .trajectories import EVALUATIONS, CountRollouts, retrace, trajectories_of
from .velocity_target import StepVelocity, VelocityTarget
from .view import REFERENCE

Count = Callable[[Tensor], None]


class DiffusionDistillation(Foreseen, OnPolicyDistillation):
    """On-policy distillation of flow-matching models, loaded from folders of diffusers pipelines.

    A trajectory is a latent at the noise levels of a few-step sampler; ``rollout.horizon`` is the number of denoising
    steps. Temperature and filters mean nothing here: sampling begins with noise, also in evaluation.

    Args:
        sampler: which states the student visits in training, and which of them are trained. Default: `Euler`.
        velocity_targets: what each teacher says of a step, by its name. Default: `StepVelocity`.
        flow_map: whether the student is told where a step ends. Default: if its transformer can be (AnyFlow's).
        height, width: of images in pixels.
        max_sequence_length: tokens of a prompt; longer ones are refused.
        shift: of the noise levels; None: what the pipeline's scheduler says.
        noising: for ``rollout.behavior: {dataset: …}``, where images of the column ``image`` are noised.
        quality: distances between samples and real images, at several numbers of steps.
        cache: a folder for encoded prompts and images; None: they are kept in memory.
        **kwargs: as in `OnPolicyDistillation`.

    Raises:
        ValueError: parts that do not fit: a divergence without densities, an answer for no teacher, ….
    """

    model_class: ClassVar[Any] = Transformer
    library: ClassVar[str] = "diffusers"
    hub_task: ClassVar[str] = "text-to-image"
    headline: ClassVar[str] = "fid"
    provides: ClassVar[frozenset[str]] = frozenset({"latents"})
    reads: ClassVar[frozenset[str]] = frozenset({"prompt", "image", REFERENCE})
    pictures = staticmethod(pictures)
    exported_with: ClassVar[tuple[str, ...]] = ("height", "width", "max_sequence_length", "shift", "flow_map")

    def __init__(
        self,
        student: Pretrained,
        objective: Objective,
        height: int,
        width: int,
        sampler: Sampler | None = None,
        velocity_targets: dict[str, VelocityTarget] | None = None,
        flow_map: bool | None = None,
        max_sequence_length: int = 256,
        shift: float | None = None,
        noising: Noising | None = None,
        quality: SampleQuality | None = None,
        cache: str | None = None,
        **kwargs: Any,
    ) -> None:
        # before the core's own, which checks that everything fits
        self.sampler, self.noising = sampler or Euler(), noising or Noising()
        self.velocity_targets = velocity_targets or {}
        self.quality, self.flow_map = quality, flow_map
        self.network_evaluations = 0
        self._family_settings = {
            "size": (height, width),
            "max_sequence_length": max_sequence_length,
            "shift": shift,
            "cache": cache,
        }
        self._families: dict[tuple[str, str | None], Family] = {}
        super().__init__(student=student, objective=objective, **kwargs)

    # -- building -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        terms = [(f"objective.terms[{i}] ({term.name})", term) for i, term in enumerate(self.objective.terms)]
        check_targets(self.velocity_targets, self.teachers)
        for where, term in terms:
            check_densities(where, term, self.sampler)
        super().check()
        for where, term in terms:
            target = self.velocity_target(str(term.teacher)) if term.teacher in term.teachers else None
            check_source(where, term, target, self.rollout)
        check_rollout(self.rollout)

    def asked_by_parts(self) -> set[str]:
        return {
            other for name, answer in self.velocity_targets.items() if name in self.teachers for other in answer.asks
        }

    def required_columns(self) -> dict[str, str]:
        needed = super().required_columns()
        if "completion" in needed:
            needed.pop("completion")
            needed["image"] = f"{needed['image']}, rollout.behavior.dataset" if "image" in needed else "the dataset"
        return needed

    def load_processor(self, spec: Pretrained) -> Family:
        key = spec.path, spec.revision
        if key not in self._families:  # encoders are loaded once for all policies of a pipeline
            config = dict(Transformer.config(*key))
            self._families[key] = load_family(spec.path, config, spec.revision, **self._family_settings)
        return self._families[key]

    def configure_callbacks(self) -> list[L.Callback]:
        return [*super().configure_callbacks(), CountRollouts()]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._place_families()

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._place_families()

    on_test_start = on_validation_start

    def _place_families(self) -> None:
        for family in self._families.values():
            family.pipe.to(self.device)

    @property
    def family(self) -> Family:
        """The student's."""
        return self.policies["student"].processor

    def audit_rows(self) -> list[tuple[str, dict[str, str]]]:
        rows: dict[str, dict[str, str]] = {"weights": {}, "latents": {}, "says": {}}
        for name, policy in self.policies.items():
            family = policy.processor or self.family
            check_latents(name, family, self.family)
            count = sum(p.numel() for p in policy.model.parameters())
            rows["weights"][name] = f"{policy.path} ({count / 1e6:.3g}M)"
            rows["latents"][name] = " × ".join(map(str, family.latent_shape))
            rows["says"][name] = "" if name == "student" else type(self.velocity_target(name)).__name__
        if self.flow_map and not self.family.jumps:
            raise ValueError(f"model.flow_map: a {type(self.family.pipe).__name__} can't be told where a step ends")
        return list(rows.items())

    def refusal(self, example: Example) -> str | None:
        self.configure_model()
        looks = [self.shown([example])[0], *(teacher.look(example) for teacher in self.teachers.values())]
        views = [view for view in looks if view is not None]
        return problem_with_row(example, views, self.family, "dataset" in self.rollout.sources)

    # -- the methods of a setting ---------------------------------------------------------------------------------

    def collate(self, examples: list[Example], policy: Policy) -> dict[str, Tensor]:
        """Returns nothing: encoded prompts are cached by content, and never stored with trajectories."""
        return {}

    def sample(
        self,
        policy: Policy,
        prompts: dict[str, Tensor],
        examples: list[Example],
        rollout: Rollout,
        seeds: list[int],
    ) -> Trajectories:
        return self._sample(self.sampler, policy, examples, rollout.horizon, seeds)

    def sample_held_out(
        self,
        policy: Policy,
        prompts: dict[str, Tensor],
        examples: list[Example],
        rollout: Rollout,
        seeds: list[int],
    ) -> Trajectories:
        return self._sample(self.sampler.evaluated(), policy, examples, rollout.horizon, seeds)

    def _sample(
        self, sampler: Sampler, policy: Policy, examples: list[Example], horizon: int, seeds: list[int]
    ) -> Trajectories:
        is_student = policy.name == "student"
        family = policy.processor if is_student else self.family  # a worker's copy of the student has its own
        device, target = next(policy.model.parameters()).device, self._target(policy)
        # 1. plans and starting noise, each by its seed
        sigma, toward, trained = (part.to(device) for part in plan_all(sampler, family.levels, horizon, seeds))
        noise = [torch.randn((1, *family.latent_shape), generator=generator(seed)) for seed in seeds]
        start = torch.cat(noise).to(device)
        evaluations = torch.zeros(len(seeds), dtype=torch.long)

        def count(rows: Tensor) -> None:
            evaluations.index_add_(0, rows.cpu(), torch.ones(len(rows), dtype=torch.long))

        # 2. the way through the levels
        field = self._field(policy, examples, target.guidance, count)

        def acting(rows: Tensor, latent: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return field(rows, latent, t, r if target.jumps else t)

        with torch.no_grad():
            after = roll_out(sampler, acting, start, sigma, toward, seeds)
        check_finite(after, examples)
        acted = trajectories_of(examples, start, after, sigma[:, :-1], toward, trained, seeds)
        if sampler.stochastic:
            acted.behavior_log_probs = self._log_probs(sampler, policy, acted, count)
        acted.observation[EVALUATIONS] = evaluations
        return acted

    def _log_probs(self, sampler: Sampler, policy: Policy, acted: Trajectories, count: Count) -> Tensor:
        """Computes log-probs ``[B, T]`` of the steps that were taken."""
        log_probs = torch.zeros(acted.mask.shape, dtype=torch.float32)
        index = acted.mask.flatten().nonzero().squeeze(-1)
        transition = self._distribution(sampler, policy, acted, acted.examples, count).at(index).chunk(slice(None))
        log_probs.view(-1)[index] = transition.log_prob(acted.actions.flatten(0, 1)[index]).float()
        return log_probs

    def replay(
        self, policy: Policy, examples: list[Example], seen: list[Example], rollout: Rollout, seeds: list[int]
    ) -> Trajectories:
        """Images of the dataset, noised: a state each, whose action is the image itself."""
        clean = policy.processor.latents([example["image"] for example in examples]).cpu()
        levels = torch.tensor([self.noising.draw(generator(seed, 1)) for seed in seeds], dtype=torch.float64)
        noise = torch.cat([torch.randn((1, *clean.shape[1:]), generator=generator(seed)) for seed in seeds])
        start = flow.noised(clean, noise, levels[:, 0]).to(clean.dtype)
        trained = torch.ones(len(examples), 1, dtype=torch.bool)
        return trajectories_of(examples, start, clean[:, None], levels[:, :1], levels[:, 1:], trained, seeds)

    def distribution(self, policy: Policy, trajectories: Trajectories, view: list[Example] | None = None) -> Lazy:
        own = self.shown(trajectories.examples, trajectories.student_view) if view is None else view
        return self._distribution(self.sampler, policy, trajectories, own, self._count)

    def _distribution(
        self, sampler: Sampler, policy: Policy, trajectories: Trajectories, examples: list[Example], count: Count
    ) -> Lazy:
        # 1. the fields of this policy and of others that its target reads
        is_student, target = policy.name == "student", self._target(policy)
        field = self._field(policy, examples, target.guidance, count)
        width, device = trajectories.mask.shape[1], trajectories.mask.device
        before = torch.cat([trajectories.observation["start"][:, None], trajectories.actions[:, :-1]], 1)
        seeds = trajectories.observation["seed"].tolist()

        @cache
        def other_field(name: str) -> VelocityField:
            if name == "self":
                return self._field(policy, examples, 1.0, count)
            own = self.shown(trajectories.examples, trajectories.student_view)
            return self._field(self.policies[name], own, 1.0, count)

        # 2. transitions, evaluated only while their chunk is open
        def make(index: Tensor) -> Transition:
            rows, at = index // width, index % width
            latent = before[rows, at]
            t, r = trajectories.channels["sigma"][rows, at], trajectories.channels["toward"][rows, at]

            if is_student and sampler.chained and torch.is_grad_enabled():
                retraced = retrace(field, trajectories, rows, at)
                # the added term is 0, with the gradient −∂x_t / t: the clean estimate x₀ = x_t − t·v then has the
                # gradient through x_t, too
                v = field(rows, retraced, t, r) + (latent - retraced) / flow.over(t, latent)
            elif is_student:
                v = field(rows, latent, t, r)
            else:
                after, state_seeds = trajectories.actions[rows, at], [seeds[row] for row in rows.tolist()]
                states = VisitedStates(
                    latent, t, r, after, state_seeds, lambda name: RestrictedField(other_field(name), rows)
                )
                v = target(RestrictedField(field, rows), states)
            return sampler.transition(latent, v.to(device), t, r)

        trained = [p for p in policy.model.parameters() if p.requires_grad] if is_student else []
        return Lazy(make, trained, bytes_per_state(self.family))

    def _target(self, policy: Policy) -> VelocityTarget:
        return StepVelocity() if policy.name == "student" else self.velocity_target(policy.name)

    def velocity_target(self, teacher: str) -> VelocityTarget:
        """Returns the velocity target of a teacher."""
        return self.velocity_targets.get(teacher) or StepVelocity()

    def rewards(self, trajectories: Trajectories) -> tuple[list[float | None] | None, list[dict[str, Any]]]:
        prompts = [example["prompt"] for example in trajectories.examples]
        if self.reward is None:
            return None, [{"prompt": prompt, "completion": ""} for prompt in prompts]
        # one at a time: what an image is decoded to must not depend on its neighbors, not by a rounding
        rewards = [
            self.reward_of(picture(self.family.images(end[None])[0].cpu()), example)
            for end, example in zip(self.ends(trajectories), trajectories.examples, strict=True)
        ]
        samples = [{"prompt": p, "completion": "", "reward": r} for p, r in zip(prompts, rewards, strict=True)]
        return rewards, samples

    # -- images ---------------------------------------------------------------------------------------------------

    def ends(self, trajectories: Trajectories) -> Tensor:
        """Returns the last latents ``[B, ...]`` of the trajectories."""
        last = (trajectories.channels["sigma"] > 0).sum(1) - 1
        return trajectories.actions[torch.arange(len(last), device=last.device), last]

    def images(self, trajectories: Trajectories) -> Tensor:
        """Decodes the trajectories' images ``[B, 3, H, W]`` in [0, 1]."""
        return self.family.images(self.ends(trajectories)).cpu()

    def velocity_field(self, policy: Policy, examples: list[Example], guidance: float = 1.0) -> VelocityField:
        """Builds the velocity field of a policy for these examples; ends of steps are inputs as of the student."""
        return self._field(policy, examples, guidance, self._count)

    def _field(self, policy: Policy, examples: list[Example], guidance: float, count: Count) -> VelocityField:
        jumps = self.family.jumps if self.flow_map is None else self.flow_map
        return velocity_field(policy, policy.processor or self.family, examples, guidance, jumps, count)

    def _count(self, rows: Tensor) -> None:
        self.network_evaluations += len(rows)

    def act(self, who: str, examples: list[Example], seeds: list[int], rollout: Rollout | None = None) -> Trajectories:
        acted = super().act(who, examples, seeds, rollout)
        self.network_evaluations += int(acted.observation[EVALUATIONS].sum())
        return acted

    # -- training -------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        self.network_evaluations = 0  # checks before the first step are no part of the run

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # of all models and all that they were asked: rollouts, teachers, the student itself, learned scores
        self.record("network_evaluations", float(self.network_evaluations))
        self.network_evaluations = 0

    # -- evaluation -----------------------------------------------------------------------------------------------

    def measure(self, stage: str, who: str, examples: list[Example], batch_idx: int) -> None:
        if self.quality is not None and not self.trainer.sanity_checking:
            steps = self.quality.test_steps if stage == "test" else self.quality.steps
            self.quality.see(self, who, examples, batch_idx, steps)

    def measured(self, stage: str) -> dict[str, float]:
        return {} if self.quality is None else self.quality.finish(self, stage)

    # -- export ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def probe(self, policy: Policy) -> Tensor:
        """Computes velocities ``[2, ...]`` at two noise levels."""
        evaluations, device = self.network_evaluations, next(policy.model.parameters()).device
        latent = torch.randn((2, *self.family.latent_shape), generator=generator(0)).to(device)
        t, r = torch.tensor([[0.8, 0.3], [0.4, 0.0]], dtype=torch.float64, device=device)
        velocities = self.velocity_field(policy, [{"prompt": "a"}])(torch.zeros(2, dtype=torch.long), latent, t, r)
        self.network_evaluations = evaluations
        return velocities.float().cpu()

    def stored_dtype(self, spec: Pretrained) -> torch.dtype | None:
        return Transformer.stored_dtype(spec.path, spec.revision)

    def save_student(self, model: Any, folder: Path) -> None:
        """Writes a pipeline's folder for ``DiffusionPipeline.from_pretrained``, or an adapter for
        ``load_lora_weights``."""
        if isinstance(model, PeftModel):
            save_adapter(self.family.pipe, model, folder)
        else:
            save_pipeline(self.family.pipe, model, folder, self._student_spec.path, self._student_spec.revision)

    def read_student(self, folder: Path) -> Policy:
        if not (folder / "model_index.json").exists():
            return Policy(with_adapter(self._student_spec.path, self._student_spec.revision, folder), self.family)
        pipe = diffusers().DiffusionPipeline.from_pretrained(folder)
        return Policy(pipe.transformer, self.load_processor(Pretrained(str(folder))))
