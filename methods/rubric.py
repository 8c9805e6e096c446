"""Rubrics that are written about a group of rollouts, and graded criterion by criterion (ROPD, 2605.07396)."""

from __future__ import annotations

import re
from typing import Any, Literal

from ..endpoint import Endpoint
from ..endpoint_reward import (
    EndpointReward,
    Unreadable,
    Verdict,
    endpoint_for,
    messages_of,
    object_schema,
    read_object,
    replies_to,
    response_format,
)
from ..note import Note
from ..policy import View, shown_by
from ..printable import quoted
from ..reward import Example
from ..trajectory import Trajectories

HEAVIEST = 10
"""Largest weight of a criterion; ours, since the scale of ROPD's was not found."""
EPSILON = 1e-8
WORD = re.compile(r"\w")
"""A criterion without one says nothing; small models copy the … that stands for it in the prompt."""


class Rubric(Note):
    """Rubric that a model behind a chat endpoint writes about each group: the column ``rubric``, before the rewards.

    A list of ``{criterion, weight}``, the same for all rollouts of a prompt; None where the view shows nothing or the
    answer is not what was asked for. Such groups have no reward, and ``train/rubric/unreadable`` is their share.

    Args:
        view: what the model reads, from the columns of the row, earlier notes (`EndpointTexts`), and ``written``, the
            list of the group's completions; its answer is to be the JSON object
            ``{"criteria": [{"criterion": text, "weight": whole number from 1 to 10}, …]}``.
        endpoint: who is asked. Default: that of ``model.reward``.
        fewest, most: criteria. Default 4 and 12 (ROPD, 2605.07396).
        unreadable: of an answer that is something else: no rubric (``abstain``, default), or the end of the run
            (``stop``).
        temperature: default 0.7 (ROPD).
        max_tokens: default 2048 (ours).
        structured: as in `EndpointReward`.

    Raises:
        ValueError: a number out of range; when training begins: no endpoint; with ``stop``: as it says.
    """

    before_reward = True
    writes = ("rubric",)

    def __init__(
        self,
        view: View,
        endpoint: Endpoint | None = None,
        fewest: int = 4,
        most: int = 12,
        unreadable: Literal["abstain", "stop"] = "abstain",
        temperature: float | None = 0.7,
        max_tokens: int | None = 2048,
        structured: bool = True,
    ) -> None:
        if not 1 <= fewest <= most or unreadable not in ("abstain", "stop"):
            raise ValueError(
                f"Rubric: fewest={fewest} and most={most} must be 1 <= fewest <= most, and unreadable={unreadable!r} "
                "'abstain' or 'stop'"
            )
        self.view, self.endpoint, self.fewest, self.most, self.unreadable = view, endpoint, fewest, most, unreadable
        self.temperature, self.max_tokens, self.structured = temperature, max_tokens, structured
        self.columns = tuple(column for column in view.columns if column != "written")

    def stand_in(self) -> dict[str, Any]:
        return {"rubric": [{"criterion": "‹criterion›", "weight": 1}]}

    def check(self, module: Any) -> None:
        endpoint_for(self.endpoint, module, "Rubric")

    def close(self) -> None:
        """Waits for no answer any more."""
        if self.endpoint is not None:
            self.endpoint.close()

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        # 1. a question about each group
        endpoint, texts = endpoint_for(self.endpoint, module, "Rubric"), module.completions(trajectories)
        groups, written = trajectories.group.tolist(), dict[int, list[str]]()
        for group, text in zip(groups, texts, strict=True):
            written.setdefault(group, []).append(text)
        rows = dict(zip(groups, trajectories.examples, strict=True))
        seen_rows = {g: shown_by(self.view, rows[g] | {"written": written[g]}, "Rubric.view") for g in written}
        # 2. its answers
        settings: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        settings["response_format"] = response_format("Rubric", self.schema()) if self.structured else None
        asked = {group: messages_of(row["prompt"]) for group, row in seen_rows.items() if row is not None}
        futures = [endpoint.ask(messages, **settings) for messages in asked.values()]
        replies = replies_to(endpoint, futures)
        # 3. read strictly
        rubrics: dict[int, list[dict[str, Any]] | None] = dict.fromkeys(written)
        for group, reply in zip(asked, replies, strict=True):
            try:
                rubrics[group] = self.read(reply.text)
            except Unreadable as error:
                if self.unreadable == "stop":
                    raise Unreadable(f"Rubric: {endpoint.url} answered {quoted(reply.text, 200)}: {error}") from None
        if asked:
            module.record("rubric/unreadable", sum(rubrics[group] is None for group in asked) / len(asked))
        return trajectories.noted({"rubric": [rubrics[group] for group in groups]})

    def schema(self) -> dict[str, Any]:
        """Returns the JSON schema of a rubric."""
        weight = {"type": "integer", "minimum": 1, "maximum": HEAVIEST}
        one = object_schema(criterion={"type": "string"}, weight=weight)
        return object_schema(criteria={"type": "array", "items": one, "minItems": self.fewest, "maxItems": self.most})

    def read(self, answer: str) -> list[dict[str, Any]]:
        """Reads a rubric.

        Raises:
            Unreadable: it is none.
        """
        criteria = read_object(answer, ("criteria",))["criteria"]
        if not isinstance(criteria, list) or not self.fewest <= len(criteria) <= self.most:
            raise Unreadable(f"there are not {self.fewest} to {self.most} criteria")
        for one in criteria:
            if not isinstance(one, dict) or set(one) != {"criterion", "weight"}:
                raise Unreadable("a criterion is no object of criterion and weight")
            if not isinstance(one["criterion"], str) or not WORD.search(one["criterion"]):
                raise Unreadable("a criterion says nothing")
            if type(one["weight"]) is not int or not 1 <= one["weight"] <= HEAVIEST:
                raise Unreadable(f"the weight {one['weight']!r} is no whole number from 1 to {HEAVIEST}")
        return criteria


class Criteria(EndpointReward):
    """Share of a rubric that a completion meets: Σ_k w_k v_k / (Σ_k w_k + ε), v_k 1 where criterion k is met, else 0.

    The rubric is the column ``rubric``, by the note `Rubric` or of the data: a list of ``{criterion, weight}``. A row
    without one abstains. Each completion is graded by itself, so that who grades knows neither the others nor whose it
    is. The words for `Feedback` are the criteria that are not met.

    Args:
        endpoint, view, unreadable, temperature, max_tokens, structured: as in `EndpointReward`; the answer is to be the
            JSON object ``{"met": [true, false, …]}``, one for each criterion.
    """

    def question(self, completion: str, example: Example) -> Any:
        return super().question(completion, example) if example.get("rubric") else None

    def schema(self, example: Example) -> dict[str, Any]:
        count = len(example["rubric"])
        return object_schema(met={"type": "array", "items": {"type": "boolean"}, "minItems": count, "maxItems": count})

    def verdict(self, answer: str, example: Example) -> Verdict:
        met, rubric = read_object(answer, ("met",))["met"], example["rubric"]
        if not isinstance(met, list) or len(met) != len(rubric) or not all(type(one) is bool for one in met):
            raise Unreadable(f"it does not say true or false of each of {len(rubric)} criteria")
        total = sum(one["weight"] for one in rubric)
        reached = sum(one["weight"] for one, is_met in zip(rubric, met, strict=True) if is_met)
        missed = [one["criterion"] for one, is_met in zip(rubric, met, strict=True) if not is_met]
        return Verdict(reached / (total + EPSILON), "\n".join(missed) or None)
