"""A setting of letters, in which a run takes seconds: a small network imitates a larger one, random and sure of itself.

A prompt is a number; a state is the prompt, the step and the letter before. The student is too small to be the teacher
everywhere, so that it matters which states it is trained at.

Shape legend: B trajectories, T steps, V letters, F features.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from side_by_side import bare_trainer
from torch import Tensor, nn
from torch.nn.functional import one_hot, pad

from opd_lightning import Categorical, Example, Head, OnPolicyDistillation, Policy, Rollout, Trajectories
from opd_lightning.evaluation_settings import Evaluation
from opd_lightning.objective import Objective, Term
from opd_lightning.pretrained import Pretrained
from opd_lightning.teacher import Frozen, Teacher

PROMPTS, STEPS, LETTERS = 8, 12, 8
FEATURES = PROMPTS + STEPS + LETTERS + 1


class Writer(nn.Module):
    """From features ``[…, F]`` to hidden states; the head makes them logits of letters.

    ``path`` is ``width,scale of the weights,seed``.
    """

    def __init__(self, width: int, scale: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh())
        self.head = nn.Linear(width, LETTERS)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))

    @classmethod
    def from_pretrained(cls, path: str, **_: Any) -> Writer:
        width, scale, seed = path.split(",")
        return cls(int(width), float(scale), int(seed))


def features(prompt: Tensor, step: Tensor, before: Tensor) -> Tensor:
    """Returns the features ``[…, F]`` of states; ``before`` is 0 where there is no letter before, else 1 + it."""
    parts = one_hot(prompt, PROMPTS), one_hot(step, STEPS), one_hot(before, LETTERS + 1)
    return torch.cat([part.float() for part in parts], -1)


class Letters(OnPolicyDistillation):
    """On-policy distillation of writers."""

    model_class, provides = Writer, frozenset({"categorical"})

    def collate(self, examples: list[Example], policy: Policy) -> dict[str, Tensor]:
        return {"prompt": torch.tensor([int(example["prompt"]) for example in examples])}

    def sample(
        self,
        policy: Policy,
        prompts: dict[str, Tensor],
        examples: list[Example],
        rollout: Rollout,
        seeds: list[int],
    ) -> Trajectories:
        draws = [torch.rand(rollout.horizon, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        before, letters, log_probs = torch.zeros(len(seeds), dtype=torch.long), [], []
        for step, uniform in enumerate(torch.stack(draws, 1)):
            at = features(prompts["prompt"], torch.full_like(before, step), before)
            logits = policy.model.head(policy.model.body(at))
            if rollout.temperature:
                shaped = (logits / rollout.temperature).softmax(-1).cumsum(-1)
                letter = (shaped < uniform[:, None]).sum(-1).clamp(max=LETTERS - 1)
            else:
                letter = logits.argmax(-1)
            letters.append(letter)
            log_probs.append(logits.log_softmax(-1).gather(1, letter[:, None])[:, 0])
            before = letter + 1
        actions = torch.stack(letters, 1)
        stopped = torch.ones(len(seeds), dtype=torch.bool)
        return Trajectories(prompts, actions, actions >= 0, examples, stopped, torch.stack(log_probs, 1))

    def distribution(
        self, policy: Policy, trajectories: Trajectories, view: list[Example] | None = None
    ) -> Categorical:
        actions = trajectories.actions
        prompt = trajectories.observation["prompt"][:, None].expand(actions.shape)
        step = torch.arange(actions.shape[1]).expand(actions.shape)
        at = features(prompt, step, pad(actions[:, :-1] + 1, (1, 0)))
        return Categorical(policy.model.body(at), Head(policy.model.head, LETTERS))

    def rewards(self, trajectories: Trajectories) -> tuple[None, list[dict[str, Any]]]:
        shown = [
            {"prompt": example["prompt"], "completion": "".join(map(str, letters))}
            for example, letters in zip(trajectories.examples, trajectories.actions.tolist(), strict=True)
        ]
        return None, shown


class Prompts(L.LightningDataModule):
    """All prompts, again and again."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def train_dataloader(self) -> Any:
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        return module.rollout_loader([{"prompt": str(i % PROMPTS)} for i in range(64 * PROMPTS)], self.seed)


def train(
    terms: Sequence[Term], seed: int, updates: int, rate: float, callbacks: Sequence[L.Callback] = (), **rollout: Any
) -> OnPolicyDistillation:
    """Trains a student of width 8, by a teacher of width 64, on 32 rollouts for each update."""
    module = Letters(
        student=Pretrained(f"8,0.3,{2 * seed}"),
        teachers={"teacher": Teacher(Frozen(Pretrained(f"64,0.7,{2 * seed + 1}")))},
        objective=Objective(list(terms)),
        rollout=Rollout(**{"batch_size": 32, "horizon": STEPS} | rollout),
        evaluation=Evaluation(before=False),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=rate),
    )
    L.seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = bare_trainer(updates, folder, *callbacks)
        trainer.fit(module, datamodule=Prompts(seed))
    return module


@torch.no_grad()
def distances(module: Any, count: int = 512) -> tuple[float, float]:
    """Returns KL(student‖teacher) of whole rollouts, in nats, and how often both find the same letter the likeliest.

    Over as many rollouts of the student.
    """
    rows = [{"prompt": str(i % PROMPTS)} for i in range(count)]
    batch = module.act("student", rows, [10**6 + i for i in range(count)], module.rollout)
    policies = [module.distribution(module.policies[name], batch) for name in ("student", "teacher")]
    log_p, log_q = (policy.head(policy.hidden).log_softmax(-1) for policy in policies)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).sum(1).mean()
    return float(divergence), 100 * float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean())
