"""Diagnostics of an open chunk: entropies, KLs, overlap and the effect of a view.

Shape legend: n steps of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..diagnostics import Averages
from ..distribution import CategoricalChunk, Gaussian, ScoredChunk, gaussian_kl
from .steps import OpenSteps

OVERLAP_K = 16


@torch.no_grad()
def chunk_diagnostics(chunk: OpenSteps, averages: Averages) -> None:
    """Adds entropies, both KLs, first-step KL, top-k overlap and privileged gap, at temperature 1, to ``averages``.

    The gap is the mean of log q(y | view) − log q(y) over the sampled steps, under the teacher's own weights. Of
    Gaussians the first three alone (`_of_gaussians`), of a `ScoredChunk` the mean of log p(y) − log q(y), which is
    KL(student‖teacher) on average over the student's own samples. Steps where a teacher is not defined count in none of
    its means.
    """
    student = chunk.student
    if isinstance(student, Gaussian):
        _of_gaussians(chunk, student, averages)
        return
    averages.add("student_entropy", student.entropy())
    log_p, p = student.known()
    for name, teacher in chunk.streams.items():
        here = chunk.knows(name).float()
        if isinstance(teacher, ScoredChunk):
            log_ratio = student.log_prob(chunk.action) - teacher.log_prob(chunk.action)
            averages.add(f"{name}/kl_sampled", log_ratio * here, here)
            continue
        assert isinstance(teacher, CategoricalChunk)
        log_q, q = teacher.known()
        if name in chunk.without_view:
            blind = chunk.without_view[name].log_prob(chunk.action)
            averages.add(f"{name}/privileged_gap", (teacher.log_prob(chunk.action) - blind) * here, here)
        log_ratio = log_p - log_q
        # in place for the second: one tensor [n, V] less
        reverse, forward = (p * log_ratio).sum(-1), -log_ratio.mul_(q).sum(-1)
        averages.add(f"{name}/kl_student_teacher", reverse * here, here)
        averages.add(f"{name}/kl_teacher_student", forward * here, here)
        averages.add(f"{name}/entropy", teacher.entropy() * here, here)
        first = here * (chunk.position == 0)
        averages.add(f"{name}/kl_first_step", reverse * first, first)
        k = min(OVERLAP_K, log_p.shape[-1])
        student_ids, teacher_ids = log_p.topk(k).indices, log_q.topk(k).indices
        shared = (student_ids[:, :, None] == teacher_ids[:, None, :]).any(-1)
        averages.add(f"{name}/overlap_top{k}", shared.float().mean(-1) * here, here)
        averages.add(f"{name}/overlap_mass", (p.gather(-1, student_ids) * shared).sum(-1) * here, here)


def _of_gaussians(chunk: OpenSteps, student: Gaussian, averages: Averages) -> None:
    """Adds entropies and KLs in closed form, in nats **per dimension** of the event: latents of any size compare.

    Densities may have a negative entropy. Steps without a density (of a sampler without noise) count in no mean.
    """
    dimensions = student.mean[0].numel()
    noisy = (student.scale > 0).expand_as(student.mean).flatten(1).all(1)

    def add(name: str, values: Tensor, here: Tensor) -> None:
        averages.add(name, (values / dimensions).masked_fill(here == 0, 0.0), here)

    add("student_entropy", student.entropy(), noisy.float())
    for name, teacher in chunk.streams.items():
        assert isinstance(teacher, Gaussian)
        here = chunk.knows(name).float() * noisy
        add(f"{name}/kl_student_teacher", gaussian_kl(student, teacher), here)
        add(f"{name}/kl_teacher_student", gaussian_kl(teacher, student), here)
        add(f"{name}/entropy", teacher.entropy(), here)
        add(f"{name}/kl_first_step", gaussian_kl(student, teacher), here * (chunk.position == 0))
