"""Refusals of the diffusion setting: of settings, before models are loaded, and of rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from ...objective import Term, Weight
from ...rollout_settings import Rollout
from ...trajectory import Example
from .families import Family
from .images import opened
from .sampler import Sampler
from .signal import FlowMatching, VelocityMatching
from .velocity_target import VelocityTarget
from .view import REFERENCE


def check_targets(targets: Mapping[str, VelocityTarget], teachers: Collection[str]) -> None:
    """Refuses velocity targets without their teachers.

    Raises:
        ValueError: a velocity target of no teacher, or one that asks a teacher that is not there.
    """
    for name, target in targets.items():
        if name not in teachers:
            raise ValueError(f"model.velocity_targets: there is no teacher {name!r}; there are {sorted(teachers)}")
        for missing in sorted(set(target.asks) - set(teachers)):
            raise ValueError(
                f"model.velocity_targets.{name}: {type(target).__name__} asks {missing!r}, which is no teacher: add "
                "it to model.teachers with the weights of a LearnedScore"
            )


def check_densities(where: str, term: Term, sampler: Sampler) -> None:
    """Refuses parts of a term that read densities of a sampler without them.

    Raises:
        ValueError: a signal or a weight that reads densities, which the sampler has none of, or a policy gradient.
    """
    if not isinstance(term.signal, VelocityMatching | FlowMatching):
        _check_signal(where, term.signal, sampler)
    for weight in term.weights:
        _check_weight(where, weight, sampler)


def _check_signal(where: str, signal: Any, sampler: Sampler) -> None:
    name = type(signal).__name__
    if not hasattr(signal, "gaussian"):
        raise ValueError(
            f"{where}: {name} is refused here: of Gaussian transitions a policy gradient has the expectation of "
            "a KL, or zero; use VelocityMatching, or ReverseKL with the sampler SDE"
        )
    if not sampler.stochastic:
        raise ValueError(
            f"{where}: {name} compares densities, which the sampler {type(sampler).__name__} has none of; use "
            "VelocityMatching, or the sampler SDE"
        )


def _check_weight(where: str, weight: Weight, sampler: Sampler) -> None:
    densities = "behavior" in weight.needs or any(name.endswith(("entropy", "log_prob")) for name in weight.reads)
    if densities and not sampler.stochastic:
        raise ValueError(
            f"{where}: {type(weight).__name__} reads densities, which the sampler {type(sampler).__name__} "
            "has none of; use the sampler SDE"
        )


def check_source(where: str, term: Term, target: VelocityTarget | None, rollout: Rollout) -> None:
    """Refuses terms on noised data whose trajectories are not all of the dataset.

    Args:
        where: the term's place in the configuration.
        term: the one that is checked.
        target: its teacher's; None: it has no teacher.
        rollout: the settings that name the sources of trajectories.

    Raises:
        ValueError: its signal or target is defined on noised data only, and it has other trajectories.
    """
    of_data = isinstance(term.signal, FlowMatching) or (target is not None and target.of_data)
    if of_data and {"dataset"} != ({term.source} if term.source else rollout.sources):
        raise ValueError(f"{where} speaks of noised data only: set its source to dataset")


def check_rollout(rollout: Rollout) -> None:
    """Refuses rollout settings of language models.

    Raises:
        ValueError: a temperature or filters, which a sampler of images does not have.
    """
    if rollout.temperature != 1 or rollout.top_p or rollout.top_k or rollout.min_p:
        raise ValueError("rollout: temperature, top_p, top_k and min_p mean nothing to a sampler of images")


def check_latents(name: str, family: Family, student: Family) -> None:
    """Compares the latents of a teacher with the student's.

    Raises:
        ValueError: the latents of a teacher and of the student are not of one shape.
    """
    if family.latent_shape != student.latent_shape:
        raise ValueError(
            f"model.teachers.{name} has latents of shape {family.latent_shape}, the student "
            f"{student.latent_shape}: they must be those of one autoencoder"
        )


def check_finite(latents: Tensor, examples: list[Example]) -> None:
    """Refuses latents that are not finite.

    Raises:
        FloatingPointError: latents ``[B, T, ...]`` that are not finite; the message names the first prompt of them.
    """
    finite = latents.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        prompt = examples[int((~finite).nonzero()[0])]["prompt"]
        raise FloatingPointError(f"the sampler's latents are not finite, first for the prompt {prompt!r}")


def problem_with_row(example: Example, shown: list[Example], family: Family, needs_image: bool) -> str | None:
    """Finds what is wrong with a row; None if nothing is.

    Args:
        example: the row.
        shown: the row as the student and each teacher with a view of it read it.
        family: the student's, which encodes prompts.
        needs_image: whether images of the dataset are noised.
    """
    for prompt in (policy_example["prompt"] for policy_example in shown):
        if not isinstance(prompt, str):
            return f"the prompt is no text but {type(prompt).__name__}"
        length, limit = family.tokens(prompt), family.max_sequence_length
        if length > limit:
            return f"the prompt has {length} tokens, model.max_sequence_length is {limit}"
    if needs_image and example.get("image") is None:
        return "image is null, and rollout.behavior.dataset needs one"
    for column, policy_example in (("image", example), *((REFERENCE, policy_example) for policy_example in shown)):
        if policy_example.get(column) is not None:
            try:
                opened(policy_example[column])
            except ValueError as error:
                return f"{column} can't be read: {error}"
    return None
