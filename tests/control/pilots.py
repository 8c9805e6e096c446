"""A setting written from docs/add_a_setting.md alone: pilots push a ball to the origin, against a wind.

Nothing here is a transformer, a token or a text, and nothing is overridden but what the page promises. The student
does not know the wind; a teacher's view tells it. A state is a place and a velocity, the simulator is run once, and a
rollout ends where the ball has come to the origin.

Shape legend: B trajectories, T steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opd_lightning import Example, Gaussian, OnPolicyDistillation, Policy, Rollout, Trajectories, View

SECONDS, NEAR = 0.3, 0.3


class Pilot(nn.Module):
    """From places and velocities ``[…, 4]``, and the wind that it knows of ``[…, 2]``, to pushes ``[…, 2]``.

    ``path`` is "novice" (random weights) or "expert" (a damped spring that leans against the wind).
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.push, self.log_scale = nn.Linear(6, 2), nn.Parameter(torch.full((2,), -1.0))
        if path == "expert":
            stiffness, damping, lean = (value * torch.eye(2) for value in (-1.5, -1.8, -1.0))
            self.push.weight.data, self.push.bias.data = torch.cat([stiffness, damping, lean], 1), torch.zeros(2)

    @classmethod
    def from_pretrained(cls, path: str, **_: Any) -> Pilot:
        return cls(path)

    def forward(self, state: Tensor, known: Tensor) -> Gaussian:
        known = known.expand(*state.shape[:-1], 2)
        return Gaussian(self.push(torch.cat([state, known], -1)), self.log_scale.exp())


class Control(OnPolicyDistillation):
    """On-policy distillation of pilots; the reward is 1 where the ball has come to the origin."""

    model_class, provides, columns = Pilot, frozenset({"reward"}), ("start", "wind")

    def collate(self, examples: list[Example], policy: Policy) -> dict[str, Tensor]:
        known = [example.get("known", [0.0, 0.0]) for example in examples]
        return {"known": torch.tensor(known)}

    def sample(
        self,
        policy: Policy,
        prompts: dict[str, Tensor],
        examples: list[Example],
        rollout: Rollout,
        seeds: list[int],
    ) -> Trajectories:
        draws = [torch.randn(rollout.horizon, 2, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        start, wind = (torch.tensor([example[name] for example in examples]) for name in ("start", "wind"))
        state, running = torch.cat([start, torch.zeros_like(start)], 1), torch.ones(len(seeds)).bool()
        states, pushes, log_probs, mask = [], [], [], []
        for noise in torch.stack(draws, 1):
            says = policy.model(state, prompts["known"])
            states.append(state)
            pushes.append(says.mean + says.scale * rollout.temperature * noise)
            log_probs.append(says.log_prob(pushes[-1]))
            mask.append(running)
            velocity = state[:, 2:] + SECONDS * (pushes[-1] + wind)
            state = torch.cat([state[:, :2] + SECONDS * velocity, velocity], 1)
            running = running & (state[:, :2].norm(dim=1) > NEAR)
        return Trajectories(
            prompts,
            torch.stack(pushes, 1),
            torch.stack(mask, 1),
            examples,
            ~running,
            torch.stack(log_probs, 1),
            channels={"state": torch.stack(states, 1)},
        )

    def distribution(self, policy: Policy, trajectories: Trajectories, view: list[Example] | None = None) -> Gaussian:
        prompts = trajectories.observation if view is None else self.collate(view, policy)
        known = prompts["known"].to(trajectories.mask.device)
        return policy.model(trajectories.channels["state"], known[:, None])

    def rewards(self, trajectories: Trajectories) -> tuple[Tensor, list[dict[str, Any]]]:
        shown = [
            {"prompt": f"from {example['start']}", "completion": f"{length} pushes"}
            for example, length in zip(trajectories.examples, trajectories.length.tolist(), strict=True)
        ]
        return trajectories.stopped.float(), shown


class Forecast(View):
    """The teacher is told the wind.

    Args:
        share: of the wind that it is told, in [0, 1].
    """

    columns = ("wind",)

    def __init__(self, share: float = 1.0) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"Forecast.share is {share}; it must be in [0, 1]")
        self.share = share

    def __call__(self, example: Example) -> Example:
        return {**example, "known": [self.share * force for force in example["wind"]]}


def starts(count: int, seed: int) -> list[Example]:
    """Places on a ring around the origin, with winds."""
    draws = torch.Generator().manual_seed(seed)
    angle, wind = torch.rand(count, generator=draws) * 6.283, 0.15 * torch.randn(count, 2, generator=draws)
    place = torch.stack([angle.cos(), angle.sin()], 1) * 2
    return [{"start": a, "wind": b} for a, b in zip(place.tolist(), wind.tolist(), strict=True)]
