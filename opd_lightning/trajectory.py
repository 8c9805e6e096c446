"""Trajectories: the batch that flows through everything.

Shape legend: B trajectories, T steps (padded), N trained steps of a micro-batch (flattened).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Example = dict[str, Any]
FLAT = ("row", "group", "seed", "weights_version", "stopped")
"""Fields of `Trajectories` with one number per trajectory, besides ``source``."""
OPTIONAL = {"reward": torch.nan, "group_mean": torch.nan, "group_std": torch.nan, "weight": 1.0}
"""Those that may be None, and what that means for a trajectory beside others that have them."""


@dataclass
class Trajectories:
    """Actions of the behavior policy, and the states that it visited. Every tensor's first dimension is B.

    Attributes:
        observation: the setting's own student inputs, each ``[B, ...]``.
        actions: ``[B, T, ...]``, the step taken at each state (token ids, latents, …).
        mask: ``[B, T]`` bool, the steps that are trained.
        examples: the B raw dataset rows, for views and rewards, with what notes say of them; rows are not in the
            checkpoint (``row`` finds them again).
        notes: what notes say of each of the B; None: nobody was asked yet (see `Note`).
        row: ``[B]`` index of each example in the training dataset.
        group: ``[B]`` which prompt draw a trajectory belongs to; members of a group share it.
        seed: ``[B]`` the seed that it was drawn with (see `Steps.uniform`).
        source: ``[B]`` index into ``sources``: who acted.
        sources: names of the behavior policies, e.g. ``("student", "dataset")``.
        weights_version: ``[B]`` number of optimizer steps the acting student had seen.
        stopped: ``[B]`` bool, ended by itself before the horizon.
        behavior_log_probs: ``[B, T]`` log-probability of each action under the acting weights at temperature 1
            and before top-p / top-k / min-p (see `Rollout`); NaN where nobody knows it (dataset completions).
        reward: ``[B]``, NaN where it abstains; None when no reward is configured.
        group_mean, group_std: ``[B]`` mean and (population) standard deviation of the group's rewards, without those
            that abstain; NaN where all do.
        weight: ``[B]`` how much each trajectory counts in every term, a constant ≥ 0 (see `weigh`); None: 1.
        channels: ``[B, T, ...]`` each, what a setting knows of every step, by name, for parts that need it; also where
            a simulator that can't be run again keeps the states that it visited. (What is kept in ``observation`` is
            not cut when a micro-batch is narrower.)
        observed: what each of the B observed that is more than steps, such as images: plain values, each with the
            step ``at`` which it begins; None: nothing. Those behind the last trained step are nobody's.
        student_view: settings of the student's view when it acted (`settings_of`), by which what it was shown is found
            again; None: nobody noted them.

    A setting's `sample` fills what the actor knows; ``row``, ``group``, ``seed``, ``source``, ``weights_version`` and
    the rewards are the loader's.
    """

    observation: dict[str, Tensor]
    actions: Tensor
    mask: Tensor
    examples: list[Example]
    stopped: Tensor
    behavior_log_probs: Tensor
    row: Tensor = None  # type: ignore[assignment]
    group: Tensor = None  # type: ignore[assignment]
    source: Tensor = None  # type: ignore[assignment]
    weights_version: Tensor = None  # type: ignore[assignment]
    seed: Tensor = None  # type: ignore[assignment]
    sources: tuple[str, ...] = ("student",)
    reward: Tensor | None = None
    group_mean: Tensor | None = None
    group_std: Tensor | None = None
    weight: Tensor | None = None
    channels: dict[str, Tensor] = field(default_factory=dict)
    student_view: dict[str, Any] | None = None
    notes: list[dict[str, Any]] | None = None
    observed: list[list[dict[str, Any]]] | None = None

    def __post_init__(self) -> None:
        for name in ("row", "group", "source", "weights_version", "seed"):
            if getattr(self, name) is None:
                setattr(self, name, torch.zeros(len(self.mask), dtype=torch.long, device=self.mask.device))

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def length(self) -> Tensor:
        """Number ``[B]`` of trained steps of each trajectory."""
        return self.mask.sum(1)

    @property
    def extent(self) -> Tensor:
        """Number ``[B]`` of steps up to and including the last trained one."""
        return (self.mask * torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device)).amax(1)

    @property
    def visible(self) -> list[list[dict[str, Any]]] | None:
        """Values that each trajectory ``observed`` up to its last trained step."""
        if self.observed is None:
            return None
        pairs = zip(self.observed, self.extent.tolist(), strict=True)
        return [[value for value in values if value["at"] < extent] for values, extent in pairs]

    @property
    def abstained(self) -> Tensor | None:
        """Trajectories ``[B]`` (bool) whose reward abstains; None without rewards."""
        return None if self.reward is None else self.reward.isnan()

    @property
    def rewarded_steps(self) -> Tensor:
        """How many trained steps have a reward; without rewards, all of them."""
        return self.mask.sum() if self.reward is None else self.mask[~self.reward.isnan()].sum()

    def without_abstentions(self) -> Trajectories:
        """Replaces unknown rewards by zeros, for parts that read them; the term is off there."""
        rewards = {name: getattr(self, name) for name in ("reward", "group_mean", "group_std")}
        return dataclasses.replace(self, **{name: v.nan_to_num() for name, v in rewards.items() if v is not None})

    def weigh(self, weight: Tensor) -> None:
        """Multiplies what each trajectory counts by ``weight [B]`` ≥ 0, which no gradient flows through.

        To be called for all micro-batches of an optimizer step before the first of them is trained.
        """
        self.weight = weight.detach() if self.weight is None else self.weight * weight.detach()

    def noted(self, columns: Mapping[str, Sequence[Any]]) -> Trajectories:
        """Adds columns of B values each to notes and examples."""
        added = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        examples = [example | more for example, more in zip(self.examples, added, strict=True)]
        notes = [note | more for note, more in zip(self.notes or [{} for _ in added], added, strict=True)]
        return dataclasses.replace(self, examples=examples, notes=notes)

    def _map(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                values[item.name] = change(value)
            elif item.name in ("observation", "channels"):
                values[item.name] = {name: change(tensor) for name, tensor in value.items()}
        return values

    def to(self, device: torch.device | str) -> Trajectories:
        # from a GPU to the CPU only when it is done: nothing else would wait before the numbers are read
        waits = torch.device(device).type == "cpu"
        return dataclasses.replace(self, **self._map(lambda tensor: tensor.to(device, non_blocking=not waits)))

    def select(self, index: Tensor) -> Trajectories:
        """Selects the trajectories at ``index [K]``, in that order."""
        lists: dict[str, Any] = {name: _at(getattr(self, name), index) for name in ("examples", "notes", "observed")}
        return dataclasses.replace(self, **self._map(lambda tensor: tensor[index.to(tensor.device)]), **lists)

    def put(self, index: Tensor, other: Trajectories, padding: dict[str, tuple[float, str]]) -> Trajectories:
        """Replaces the trajectories at ``index [K]`` by the K of ``other``, which were drawn for the same prompts.

        Examples, rows and groups stay those of this batch. Notes and rewards are those of none (None), and channels
        that one of both lacks are gone: the loader asks for them again, and for the statistics of the groups.

        Args:
            index: whom they replace.
            other: what a policy did instead (`OnPolicyDistillation.act`); its observation is what is trained on.
            padding: as in `concatenate`.

        Raises:
            ValueError: they are not as many as ``index`` names.
        """
        if len(index) != len(other):
            raise ValueError(f"{len(other)} trajectories can't take the place of {len(index)}")
        # into both batches, one behind the other: a replaced one is found in the second
        places = torch.arange(len(self))
        places[index.cpu()] = len(self) + torch.arange(len(other))
        both = [name for name in self.channels if name in other.channels]
        parts = [dataclasses.replace(part, channels={n: part.channels[n] for n in both}) for part in (self, other)]
        joined = Trajectories.concatenate(parts, padding).select(places)
        own: dict[str, Any] = {"examples": self.unjudged().examples, "row": self.row, "group": self.group}
        return dataclasses.replace(joined, **own, notes=None, reward=None, group_mean=None, group_std=None)

    def unjudged(self) -> Trajectories:
        """Takes off what was found out: notes with their columns, and rewards."""
        notes = self.notes or [{} for _ in self.examples]
        rows = [_without(example, note) for example, note in zip(self.examples, notes, strict=True)]
        return dataclasses.replace(self, examples=rows, notes=None, reward=None, group_mean=None, group_std=None)

    def truncate(self, horizon: int) -> Trajectories:
        """Cuts each trajectory at ``horizon`` steps; those that were cut no longer count as stopped."""
        if self.mask.shape[1] <= horizon:
            return self
        return dataclasses.replace(
            self,
            actions=self.actions[:, :horizon],
            mask=self.mask[:, :horizon],
            behavior_log_probs=self.behavior_log_probs[:, :horizon],
            channels={name: values[:, :horizon] for name, values in self.channels.items()},
            stopped=self.stopped & ~self.mask[:, horizon:].any(1),
        )

    def split(self, size: int) -> Iterator[Trajectories]:
        """Yields micro-batches of ``size`` trajectories, each without the steps that only the others need."""
        for part in torch.arange(len(self)).split(size):
            piece = self.select(part)
            yield piece.truncate(max(1, int(piece.extent.max())))

    def followed_by(self, later: Trajectories) -> Trajectories:
        """Appends to each trajectory the steps of a later one, without a gap; its own are then visible, not trained.

        Observation and what belongs to whole trajectories are those of ``later``. Channels that one of both lacks are
        gone.

        Args:
            later: what was done behind the last step of each of these that its mask holds.
        """
        own, more = self.mask.shape[1], later.mask.shape[1]
        steps = torch.arange(max(own, more))
        held = torch.cat([steps[:own] < self.extent[:, None], steps[:more] < later.extent[:, None]], 1)
        order = (~held).int().argsort(dim=1, stable=True)[:, : max(1, int(held.sum(1).max()))]

        def join(first: Tensor, second: Tensor) -> Tensor:
            both = torch.cat([first, second], 1)
            index = order.view(*order.shape, *(1 for _ in both.shape[2:])).expand(*order.shape, *both.shape[2:])
            return both.gather(1, index)

        mask = join(torch.zeros_like(self.mask), later.mask)
        observed = self.visible
        if later.observed is not None:
            moved = [
                [value | {"at": value["at"] + before} for value in values]
                for values, before in zip(later.observed, self.extent.tolist(), strict=True)
            ]
            observed = [first + more for first, more in zip(observed or [[] for _ in moved], moved, strict=True)]
        return dataclasses.replace(
            later,
            observed=observed,
            actions=join(self.actions, later.actions),
            mask=mask,
            behavior_log_probs=join(self.behavior_log_probs, later.behavior_log_probs).masked_fill(~mask, 0.0),
            channels={n: join(v, later.channels[n]) for n, v in self.channels.items() if n in later.channels},
        )

    def until(self, steps: Tensor) -> Trajectories:
        """Cuts each trajectory behind its first ``steps [B]`` steps, all of which its mask then holds.

        What is left is for others to go on from (`Actor.act`, ``begun``).
        """
        held = torch.arange(self.mask.shape[1]) < torch.minimum(steps, self.extent)[:, None]
        return dataclasses.replace(self, mask=held, stopped=torch.zeros_like(self.stopped))

    def state_dict(self) -> dict[str, Any]:
        """Saves tensors, strings, lists and dicts only, so that a checkpoint loads with ``weights_only=True``."""
        names = ("student_view", "notes", "observed")
        plain = {"sources": list(self.sources), **{name: getattr(self, name) for name in names}}
        return {**self._map(lambda tensor: tensor.cpu()), **plain}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], examples: list[Example]) -> Trajectories:
        """Restores a batch; ``examples``: its rows of the data set, to which its notes are added."""
        if (notes := state.get("notes")) is not None:
            examples = [example | note for example, note in zip(examples, notes, strict=True)]
        return cls(**{**state, "sources": tuple(state["sources"]), "examples": examples})

    @classmethod
    def concatenate(cls, parts: Sequence[Trajectories], pad: dict[str, tuple[float, str]]) -> Trajectories:
        """Joins batches of different widths; where only some have rewards or weights, the others abstain and weigh 1.

        ``pad`` names the observation tensors that must be widened first: value, and the side ("left" or "right").

        Raises:
            ValueError: they have not the same channels.
        """
        # 1. channels, and the width of all
        if len(names := {tuple(sorted(part.channels)) for part in parts}) > 1:
            listed = " and ".join(f"[{', '.join(some)}]" for some in sorted(names))
            raise ValueError(f"trajectories of one generation batch have different channels: {listed}")
        steps = max(part.mask.shape[1] for part in parts)

        def join(tensors: list[Tensor], value: float = 0, side: str = "right", width: int | None = None) -> Tensor:
            wide = max(t.shape[1] for t in tensors) if width is None else width
            return torch.cat([_widen(tensor, wide, value, side) for tensor in tensors])

        # 2. observations, whose widths are their own
        first = parts[0]
        observation = {
            name: join([part.observation[name] for part in parts], *pad[name])
            if name in pad
            else torch.cat([part.observation[name] for part in parts])
            for name in first.observation
        }
        # 3. sources, numbered anew, and what only some batches have
        sources = tuple(dict.fromkeys(name for part in parts for name in part.sources))
        places = [torch.tensor([sources.index(name) for name in part.sources]) for part in parts]
        source = [place.to(part.source.device)[part.source] for place, part in zip(places, parts, strict=True)]
        flat = {name: torch.cat([getattr(part, name) for part in parts]) for name in FLAT}
        for name, missing in OPTIONAL.items():
            values = [getattr(part, name) for part in parts]
            if any(value is not None for value in values):
                # only some have it: the others get what it means to have none
                unknown = [torch.full_like(part.row, missing, dtype=torch.float32) for part in parts]
                flat[name] = torch.cat([u if v is None else v for u, v in zip(unknown, values, strict=True)])
        return cls(
            observation=observation,
            actions=join([part.actions for part in parts], width=steps),
            mask=join([part.mask for part in parts], width=steps),
            behavior_log_probs=join([part.behavior_log_probs for part in parts], width=steps),
            channels={name: join([part.channels[name] for part in parts], width=steps) for name in first.channels},
            examples=[example for part in parts for example in part.examples],
            source=torch.cat(source),
            sources=sources,
            student_view=first.student_view,
            observed=None
            if all(part.observed is None for part in parts)
            else [values for part in parts for values in part.observed or [[] for _ in part.examples]],
            notes=None
            if any(part.notes is None for part in parts)
            else [n for part in parts for n in part.notes or ()],
            **flat,
        )


def _without(example: Example, note: dict[str, Any]) -> Example:
    """Returns a row as it was before anything was noted."""
    row = example | {}
    for column in note:
        del row[column]
    return row


def _at(items: list[Any] | None, index: Tensor) -> list[Any] | None:
    return None if items is None else [items[i] for i in index.tolist()]


def _widen(tensor: Tensor, width: int, value: float, side: str) -> Tensor:
    missing = width - tensor.shape[1]
    if not missing:
        return tensor
    fill = tensor.new_full((tensor.shape[0], missing, *tensor.shape[2:]), value)
    return torch.cat([fill, tensor] if side == "left" else [tensor, fill], 1)
