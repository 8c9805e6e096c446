"""Callbacks that branch off states that were visited, and what is made of what they find.

Shape legend: B trajectories, T steps, n states, K branches of each.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..callback import DistillationCallback
from ..distribution import CategoricalChunk
from ..module import OnPolicyDistillation
from ..objective import OpenSteps
from ..objective.advantage import Against, LogRatio
from ..objective.signal import ADVICE
from ..objective.steps import Steps
from ..objective.weight import Weight
from ..rollout_settings import derived_seed
from ..sharding import refuse_sharded
from ..trajectory import Trajectories

AUDITED = 7301
"""Which further draws of a trajectory's seed (`derived_seed`) its continuations are written with."""
SURENESS, AUDIT = "sureness", "audit"
"""Channels ``[B, T]`` that the callbacks fill, for the parts below."""


class LookAhead(DistillationCallback):
    """Finds how sure the teacher is one step after each of the student's likeliest actions (after LGR, 2605.30833).

    Where the student's entropy is above a threshold, the teacher reads each of the K candidates behind the state:
    c(v) = max q(· | state, v). The action's own c, less the mean and over the standard deviation of the K, is what
    `LogRatioPlusSureness` adds; 0 elsewhere, where the action is none of them, and where nothing follows it. Logged:
    ``train/look_ahead/share``, of steps.

    Args:
        candidates: K, default 8 (LGR).
        threshold: on the student's entropy in nats, default 0.2 (LGR).
        teacher: an entry of ``model.teachers``.

    Raises:
        ValueError: a number out of range; when training begins: no vocabulary, or a strategy that shards the student.
    """

    provides = frozenset({SURENESS})

    def __init__(self, candidates: int = 8, threshold: float = 0.2, teacher: str = "teacher") -> None:
        if candidates < 2 or threshold < 0:
            raise ValueError(f"LookAhead: candidates={candidates} must be >= 2 and threshold={threshold} >= 0")
        self.candidates, self.threshold, self.teacher = candidates, threshold, teacher

    @property
    def asks(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self.teacher})

    distributions = asks

    def check(self, module: OnPolicyDistillation) -> None:
        if "turn" not in module.provides:
            raise ValueError("LookAhead puts other tokens behind states, which only settings that write tokens have")
        refuse_sharded(module.trainer, "LookAhead", "which reads as many states as each rank has")

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        # 1. where the student is puzzled, and its candidates there
        likeliest: list[Tensor] = []

        def read(steps: OpenSteps) -> Tensor:
            assert isinstance(steps.student, CategoricalChunk)
            log_probs = steps.student.known()[0]
            likeliest.append(log_probs.topk(min(self.candidates, log_probs.shape[-1])).indices.cpu())
            return steps.statistic("student/entropy")

        entropy = module.per_step(trajectories, read)
        mask = trajectories.mask
        # 2. not behind the last step of a turn, whose next state is no policy's
        followed = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
        puzzled = mask & followed & (entropy > self.threshold)
        likely = torch.cat(likeliest)[puzzled[mask]]  # steps are read in their order
        sureness = torch.zeros(mask.shape)
        if bool(puzzled.any()):
            rows, places = puzzled.nonzero(as_tuple=True)
            sure = self.sure(module, trajectories, rows, places, likely)
            sureness[puzzled] = standardized(sure, likely == trajectories.actions[puzzled][:, None])
        module.record("look_ahead/share", puzzled[mask].double())
        return replace(trajectories, channels=trajectories.channels | {SURENESS: sureness})

    def sure(
        self, module: OnPolicyDistillation, trajectories: Trajectories, rows: Tensor, steps: Tensor, ids: Tensor
    ) -> Tensor:
        """Returns the teacher's largest probability behind each candidate ``ids [n, K]`` of n states, ``[n, K]``."""
        count = ids.shape[1]
        branches, places = trajectories.select(rows.repeat_interleave(count)), steps.repeat_interleave(count)
        every, mask = torch.arange(len(places)), torch.zeros_like(branches.mask)
        mask[every, places + 1] = True
        actions = branches.actions.clone()
        actions[every, places] = ids.flatten()
        changed = replace(branches, actions=actions, mask=mask)
        peak = module.per_step(changed, lambda steps: steps.statistic("teacher/peak"), self.teacher)
        return peak[mask].view(ids.shape)


def standardized(values: Tensor, own: Tensor) -> Tensor:
    """Returns (own value − mean) / standard deviation of ``values [n, K]``, ``[n]``; 0 where none is its ``own``.

    Where all are alike, or nobody knows them, it is 0.
    """
    spread = values.std(1, correction=0, keepdim=True)
    scaled = (values - values.mean(1, keepdim=True)) / (spread + 1e-6)
    return torch.where(own, scaled, 0.0).sum(1).nan_to_num()


class LogRatioPlusSureness(LogRatio):
    """Advantage δ + γ·c, c what `LookAhead` found: how sure the teacher is one step later (after LGR, 2605.30833).

    Args:
        coefficient: γ, default 1 (LGR).
        against: as in `LogRatio`.
    """

    advice = ADVICE | {SURENESS: "add the callback LookAhead to trainer.callbacks"}

    def __init__(self, coefficient: float = 1.0, against: Against = "student") -> None:
        super().__init__(against=against)
        self.coefficient = coefficient

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return super().needs | {SURENESS}

    def __call__(self, steps: Steps) -> Tensor:
        return super().__call__(steps) + self.coefficient * steps.channel(SURENESS)


class SpeculativeAudit(DistillationCallback):
    """Asks a teacher that only writes how alike it goes on where the student was in doubt (OmniOPD, 2606.01476).

    Around the M trained steps of a rollout with the highest entropy there is a chunk of C steps each, none of which
    overlap. From its first state the teacher writes N continuations, and π = (Σ φ + α·p̄) / (N + α) is what the chunk is
    worth: φ in [0, 1] the likeness of the texts (1 − edit distance / the longer one's length), p̄ the geometric mean of
    the student's probabilities. It is the weight `Audited` of all steps of the chunk.

    Args:
        anchors: M, default 10 (OmniOPD).
        chunk: C, default 50 (OmniOPD).
        continuations: N, default 10 (OmniOPD). 0: π = p̄.
        alpha: α, default 1 (OmniOPD).
        teacher: the entry of ``model.teachers`` that writes.

    Raises:
        ValueError: a number out of range; when training begins: a setting without texts, or a strategy that shards the
            student, or an environment.
    """

    provides = frozenset({AUDIT})

    def __init__(
        self,
        anchors: int = 10,
        chunk: int = 50,
        continuations: int = 10,
        alpha: float = 1.0,
        teacher: str = "teacher",
    ) -> None:
        if min(anchors, chunk) < 1 or continuations < 0 or alpha <= 0:
            raise ValueError(
                f"SpeculativeAudit: anchors={anchors} and chunk={chunk} must be >= 1, continuations={continuations} "
                f">= 0 and alpha={alpha} > 0"
            )
        self.anchors, self.chunk, self.continuations, self.alpha = anchors, chunk, continuations, alpha
        self.teacher = teacher

    @property
    def sources(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({self.teacher})

    def check(self, module: OnPolicyDistillation) -> None:
        if "turn" not in module.provides or getattr(module, "environment", None) is not None:
            raise ValueError("SpeculativeAudit compares texts of one turn: leave model.environment out")
        refuse_sharded(module.trainer, "SpeculativeAudit", "which acts as often as each rank has chunks")

    def on_rollouts(self, module: OnPolicyDistillation, trajectories: Trajectories) -> Trajectories:
        # 1. chunks
        entropy = module.per_step(trajectories, lambda steps: steps.statistic("student/entropy"))
        chunks = [
            (row, *place)
            for row, mask in enumerate(trajectories.mask)
            for place in chunks_of(entropy[row][mask], self.anchors, self.chunk)
        ]
        # 2. what the teacher writes in their places
        texts = module.decode_steps(trajectories)
        assert texts is not None
        likeness = self.likeness(module, trajectories, chunks, texts)
        # 3. what they are worth
        audit = torch.zeros(trajectories.mask.shape)
        for (row, begin, end), alike in zip(chunks, likeness, strict=True):
            steps = trajectories.mask[row].nonzero().squeeze(1)[begin:end]
            own = trajectories.behavior_log_probs[row, steps].mean().exp()
            audit[row, steps] = (alike + self.alpha * own) / (self.continuations + self.alpha)
        module.record("speculative_audit/worth", audit[audit > 0].double())
        return replace(trajectories, channels=trajectories.channels | {AUDIT: audit})

    def likeness(
        self,
        module: OnPolicyDistillation,
        trajectories: Trajectories,
        chunks: list[tuple[int, int, int]],
        texts: list[list[str]],
    ) -> list[float]:
        """Returns Σ φ over the teacher's continuations, of each chunk."""
        if not self.continuations or not chunks:
            return [0.0] * len(chunks)
        asked = [chunk for chunk in chunks for _ in range(self.continuations)]
        rows, steps = (torch.tensor(values) for values in zip(*((row, begin) for row, begin, _ in asked), strict=True))
        seeds = [
            derived_seed(int(trajectories.seed[row]), AUDITED, begin, i % self.continuations)
            for i, (row, begin, _) in enumerate(asked)
        ]
        written = module.actor.branch(self.teacher, trajectories, rows, steps, self.chunk, seeds)
        others = module.decode_steps(written)
        assert others is not None
        alike = [
            similarity("".join(texts[row][begin:end]), "".join(other[: end - begin]))
            for (row, begin, end), other in zip(asked, others, strict=True)
        ]
        return [float(sum(part)) for part in np.array(alike).reshape(len(chunks), -1)]


def chunks_of(entropy: Tensor, anchors: int, size: int) -> list[tuple[int, int]]:
    """Places chunks of ``size`` steps around those with the highest ``entropy [T]``, none of which overlap."""
    chunks: list[tuple[int, int]] = []
    for anchor in entropy.argsort(descending=True, stable=True).tolist():
        begin = max(0, anchor - size // 2)
        end = min(len(entropy), begin + size)
        if len(chunks) < anchors and all(end <= other or begin >= until for other, until in chunks):
            chunks.append((begin, end))
    return sorted(chunks)


def similarity(one: str, other: str) -> float:
    """Returns 1 − Levenshtein distance / length of the longer text; 1 for two empty ones."""
    if not one or not other:
        return float(one == other)
    letters, ahead = np.array([*other]), np.arange(len(other) + 1)
    row = ahead.copy()
    for i, letter in enumerate(one, 1):
        best = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (letters != letter))])
        # an insertion goes on from the entry before, so the row is a running minimum
        row = np.minimum.accumulate(best - ahead) + ahead
    return 1 - float(row[-1]) / max(len(one), len(other))


class Audited(Weight):
    """Weight π of the steps that `SpeculativeAudit` has looked at, 0 of the rest.

    Args:
        complement: 1 of the rest and 0 of those, for the other term. Default: no.
    """

    scope = "data"
    needs = frozenset({AUDIT})
    advice = ADVICE | {AUDIT: "add the callback SpeculativeAudit to trainer.callbacks"}

    def __init__(self, complement: bool = False) -> None:
        self.complement = complement

    def __call__(self, steps: Steps) -> Tensor:
        worth = steps.channel(AUDIT)
        return (worth == 0).float() if self.complement else worth
