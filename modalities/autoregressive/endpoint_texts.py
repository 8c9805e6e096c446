"""EndpointTexts: what a model behind a chat endpoint writes about each row."""

from __future__ import annotations

import json
from typing import Any

from ...chat import Chat
from ...endpoint import Endpoint
from ...endpoint_reward import endpoint_for, messages_of, replies_to
from ...note import Note
from ...policy import View, shown_by
from ...trajectory import Trajectories


class EndpointTexts(Note):
    """Texts that a model behind a chat endpoint writes about each row: answers of a teacher known by its words alone.

    The column holds a list of them, for templates such as ``"{{ teacher_texts[0] }}"``; None where the view shows
    nothing. Rows that show the same share theirs. It is made before the rewards, and reads nothing of the rollout.

    Args:
        view: what the model is asked, from the columns of the row; a prompt of text or messages. Default: the row's own
            prompt.
        endpoint: who is asked. Default: that of ``model.reward``.
        column: where texts go.
        count: how many of each row. Default 4 (ROPD, 2605.07396).
        temperature: default 1 (ours).
        max_tokens: of a text. Default 1024 (ours).

    Raises:
        ValueError: a count below 1; when training begins: no endpoint.
    """

    before_reward = True

    def __init__(
        self,
        view: View | None = None,
        endpoint: Endpoint | None = None,
        column: str = "teacher_texts",
        count: int = 4,
        temperature: float | None = 1.0,
        max_tokens: int | None = 1024,
    ) -> None:
        if count < 1:
            raise ValueError(f"EndpointTexts.count is {count}; it must be at least 1")
        self.view, self.endpoint, self.count = view, endpoint, count
        self.temperature, self.max_tokens = temperature, max_tokens
        self.writes, self.columns = (column,), () if view is None else view.columns

    def stand_in(self) -> dict[str, Any]:
        (column,) = self.writes
        return {column: [f"‹{column}›"] * self.count}

    def check(self, module: Any) -> None:
        endpoint_for(self.endpoint, module, "EndpointTexts")

    def close(self) -> None:
        """Waits for no answer any more."""
        if self.endpoint is not None:
            self.endpoint.close()

    def __call__(self, module: Any, trajectories: Trajectories) -> Trajectories:
        # 1. what is asked: of rows that show the same once
        endpoint, questions = endpoint_for(self.endpoint, module, "EndpointTexts"), dict[str, Chat]()
        keys: list[str | None] = []
        for example in trajectories.examples:
            row = example if self.view is None else shown_by(self.view, example, "EndpointTexts.view")
            messages = [] if row is None else messages_of(row["prompt"])
            keys.append(json.dumps(messages) if messages else None)
            if messages:
                questions[json.dumps(messages)] = messages
        # 2. several texts of each
        settings: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        asked = [(messages, draw) for messages in questions.values() for draw in range(self.count)]
        replies = replies_to(endpoint, [endpoint.ask(messages, draw, **settings) for messages, draw in asked])
        if replies:
            module.record(f"{self.writes[0]}/cut", sum(reply.cut for reply in replies) / len(replies))
        texts = [reply.text for reply in replies]
        of_question = {key: texts[i * self.count : (i + 1) * self.count] for i, key in enumerate(questions)}
        return trajectories.noted({self.writes[0]: [None if key is None else of_question[key] for key in keys]})
