"""Identity: what an answer depends on besides the question, to be compared where it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ....likeness import fingerprint
from ....student_view import settings_of
from ....teacher import Elsewhere, Teacher

READ = ("tokenizer", "template", "view", "student_view")
"""What decides how a teacher reads a row, which the run that reads its answers knows, too."""


def mark(value: Any) -> str:
    """Computes a short fingerprint of plain values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def reading(setting: Any, teacher: Teacher) -> dict[str, str]:
    """Describes how a teacher reads rows, with the student's tokenizer, and its chat template or the teacher's own."""
    tokenizer, processor = setting.tokenizer(), setting.policies["student"].processor
    template = [processor.chat_template, setting.chat_template_kwargs, getattr(setting, "raw_prompts", False)]
    described = mark(template) if processor.chat_template is not None else "none"
    ids = {token: i for token, i in tokenizer.get_vocab().items() if i < setting.vocabulary}
    return {
        "tokenizer": f"{mark([ids, setting.eos])} ({len(ids)} tokens)",
        "template": f"{described}, its own" if teacher.own_template else described,
        "view": _described(teacher.view),
        "student_view": _described(setting.student_view),
    }


def weights(setting: Any, name: str) -> str:
    """Describes the weights of a teacher: their fingerprint, and where they came from."""
    origin = setting.teachers[name].weights
    if isinstance(origin, Elsewhere):
        return setting.elsewhere[name]["weights"]
    policy = setting.policies[name]
    return f"{fingerprint(policy.model)} ({type(origin).__name__}, {policy.path})"


def mark_of(described: str) -> str:
    """Returns the fingerprint of weights that were described."""
    return described.partition(" ")[0]


def differences(then: Mapping[str, Any], now: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """Lists in words what differs."""
    return [f"{name} was {then.get(name)}, and is {now.get(name)}" for name in names if then.get(name) != now.get(name)]


def _described(view: Any) -> str:
    if view is None:
        return "none"
    settings = settings_of(view)
    return f"{settings.pop('class')}, {mark(settings)}"
