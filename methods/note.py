"""Notes of single papers: what is found out about rollouts before they are trained."""

from __future__ import annotations

import re
from typing import Any

from ..note import Note
from ..reward import Reward
from ..trajectory import Trajectories


class Stated(Note):
    """Numbers that texts of earlier notes state, such as how sure their author is; None where one states none.

    Args:
        of: the columns to write, each with the column of the text, such as ``{confidence: opinion}``.
        pattern: a regular expression with one group; the last match counts. Default: the tag of MAD-OPD's code
            (2605.01347), ``<<CONFIDENCE=87>>``.

    Raises:
        ValueError: no columns, or a pattern that is none, or has not one group.
    """

    def __init__(self, of: dict[str, str], pattern: str = r"<<CONFIDENCE=(\d+)>>") -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"Stated.pattern {pattern!r} is not a regular expression: {error}") from None
        if self.pattern.groups != 1 or not of:
            raise ValueError(f"Stated needs columns and a pattern with one group, got {of} and {pattern!r}")
        self.of = of
        self.writes, self.columns = tuple(of), tuple(of.values())

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        rows = trajectories.examples
        return trajectories.noted({name: [self.number_in(row[of]) for row in rows] for name, of in self.of.items()})

    def number_in(self, text: str | None) -> float | None:
        """Returns the last number that a text states; None where there is none."""
        stated = self.pattern.findall(text or "")
        return float(stated[-1]) if stated else None


class Measured(Note):
    """Numbers that rewards give a completion besides the one that it is trained on: a column for each metric.

    Args:
        metrics: rewards by column, such as what a completion is good for and what it keeps to itself (SELFCI,
            2605.20258). None where one abstains.

    Raises:
        ValueError: no metrics.
    """

    def __init__(self, metrics: dict[str, Reward]) -> None:
        if not metrics:
            raise ValueError("Measured.metrics is empty; name at least one reward, by the column that it goes to")
        self.metrics, self.writes = metrics, tuple(metrics)
        self.columns = tuple(dict.fromkeys(column for metric in metrics.values() for column in metric.columns))

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        texts, rows = module.completions(trajectories), trajectories.examples
        known = [row | module.parsed(text, row) for text, row in zip(texts, rows, strict=True)]
        return trajectories.noted(
            {
                column: [module.scoring(metric, text, row) for text, row in zip(texts, known, strict=True)]
                for column, metric in self.metrics.items()
            }
        )


class OtherPrompt(Note):
    """Prompt of another group of the generation batch, on the same rank: the column ``another_prompt``.

    The group's that comes next, and after the last one the first's; None where there is but one. What a text makes
    likelier under any prompt is not about this one (CREDIT, 2605.11613).
    """

    writes = ("another_prompt",)

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        groups = trajectories.group.tolist()
        prompts = {group: row["prompt"] for group, row in zip(groups, trajectories.examples, strict=True)}
        order = list(prompts)
        others = dict(zip(order, [*order[1:], *order[:1]], strict=True))
        return trajectories.noted(
            {"another_prompt": [prompts[others[group]] if len(order) > 1 else None for group in groups]}
        )


class Extremes(Note):
    """Best and worst completion of the group by reward: the columns ``best`` and ``worst`` (GenEvolve, 2605.21605).

    The first of equals; None where their rewards differ by less than ``gap``, or all abstain.

    Args:
        gap: default 0.2 (GenEvolve).

    Raises:
        ValueError: when training begins: no rewards, or no group.
    """

    writes = ("best", "worst")

    def __init__(self, gap: float = 0.2) -> None:
        self.gap = gap

    def check(self, module: Any) -> None:
        if not module.has_rewards or module.rollout.group_size < 2:
            raise ValueError("Extremes compares the rewards of a group: set model.reward, rollout.group_size > 1")

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        texts, groups = module.completions(trajectories), trajectories.group.tolist()
        assert trajectories.reward is not None
        members: dict[int, list[tuple[float, str]]] = {group: [] for group in groups}
        for group, reward, text in zip(groups, trajectories.reward.tolist(), texts, strict=True):
            if reward == reward:
                members[group].append((reward, text))
        columns: dict[str, list[str | None]] = {"best": [], "worst": []}
        for group in groups:
            judged = members[group]
            best = max(judged, key=lambda member: member[0], default=(0.0, ""))
            worst = min(judged, key=lambda member: member[0], default=(0.0, ""))
            is_apart = bool(judged) and best[0] - worst[0] >= self.gap
            columns["best"].append(best[1] if is_apart else None)
            columns["worst"].append(worst[1] if is_apart else None)
        return trajectories.noted(columns)
