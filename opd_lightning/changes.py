"""Changes of a run's configuration: what differs from a checkpoint's, and which of it needs a permission."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

# What says where a run is read from and not what it does
_APART = ("ckpt_path", "config", "weights_only")
_PERMISSION = "checkpoint.may_change"
_ABSENT = "nothing"
_SHOWN = 20
_UNNAMED = ("init_args", "class_path", "dict_kwargs")
# What decides what is trained, and how
_DECISIVE = (
    "model",
    "trainer.callbacks",
    "trainer.precision",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
    "trainer.accumulate_grad_batches",
)
# Of these, what moves no weight, and what is compared by what it leads to: weights, and batches over all ranks
_HARMLESS = (
    "model.evaluation",
    "model.agreement",
    "model.on_nonfinite",
    "model.scoring.timeout",
    "model.student.gradient_checkpointing",
    "model.rollout.batch_size",
    "model.rollout.group_size",
    "model.rollout.micro_batch_size",
    "model.rollout.epochs",
)
# Last words of keys that say where something is or how long it may take, below what has such a place; weights that are
# read there are compared themselves
_PLACES = ("path", "url", "folder", "device", "key", "timeout", "revision", "gguf_file", "trust_remote_code")
_PLACED = ("student", "pretrained", "weights", "server", "endpoint", "engine", "environment", "reward")
# What people name as they like: words behind these are no settings
_NAMED = ("teachers", "notes", "metrics")
# What a run may spend on the answers of a server
_SPENDING = ".endpoint.budget"


def changes(then: str, now: str) -> list[list[str]]:
    """Lists ``[key, old, new]`` for each value in which two configurations (YAML) differ; empty if one is unknown."""
    if not then or not now:
        return []
    return differences(yaml.safe_load(then), yaml.safe_load(now))


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[list[str]]:
    """Lists ``[key, old, new]`` for each value in which two configurations differ."""
    old, new = leaves(then), leaves(now)
    keys = [key for key in {**old, **new} if key.split(".")[0] not in _APART and not _below(key, [_PERMISSION])]
    return [
        [key, str(old.get(key, _ABSENT)), str(new.get(key, _ABSENT))]
        for key in keys
        if old.get(key, _ABSENT) != new.get(key, _ABSENT)
    ]


def other_weights(then: Mapping[str, str], now: Mapping[str, str]) -> list[list[str]]:
    """Lists ``[key, old, new]`` for each teacher, known in both, whose weights have another fingerprint."""
    return [
        [f"model.teachers.{name}", f"weights {then[name]}", f"weights {mark}"]
        for name, mark in now.items()
        if then.get(name, mark) != mark
    ]


def check_permitted(changed: Sequence[Sequence[str]], may_change: Sequence[str]) -> None:
    """Refuses changes of what is trained, and how, that nobody has permitted.

    Args:
        changed: ``[key, old, new]`` of each.
        may_change: keys, as people write them, that may change with all that is below them.

    Raises:
        ValueError: a change is not permitted; the message lists each of these, and the argument that permits them.
    """
    refused = [(short(key), old, new) for key, old, new in changed if _decides(key, old, new)]
    refused = [entry for entry in refused if not _below(entry[0], [short(key) for key in may_change])]
    if not refused:
        return
    lines = [f"  {key}: {old} -> {new}" for key, old, new in refused[:_SHOWN]]
    if len(refused) > _SHOWN:
        lines.append(f"  and {len(refused) - _SHOWN} more")
    keys = list(dict.fromkeys([*may_change, *(_outside_lists(key) for key, *_ in refused)]))
    raise ValueError(
        "the checkpoint was written with another configuration, of which these decide what is trained:\n"
        + "\n".join(lines)
        + "\nTo go on all the same, with the new values, say which may change: "
        f"--checkpoint.may_change='[{', '.join(keys)}]'"
    )


def told(history: list[dict[str, Any]]) -> list[str]:
    """Formats a line for each change."""
    return [
        f"after optimizer step {entry['step']}: {key} {new} (was {old})"
        for entry in history
        for key, old, new in entry["keys"]
    ]


def short(key: str) -> str:
    """Shortens a key to what people write: ``model.init_args.rollout.horizon`` is ``model.rollout.horizon``."""
    return ".".join(word for word in key.split(".") if word not in _UNNAMED)


def _decides(key: str, old: str, new: str) -> bool:
    """Tells whether a change is one of what is trained, and how."""
    if old == _ABSENT and new in ("None", "False", "[]", "{}"):
        return False  # a setting that an earlier version did not have, and that is not used
    key = short(key)
    harmless = _below(key, _HARMLESS) or _is_place(key) or f"{_SPENDING}." in f"{key}."
    return _below(key, _DECISIVE) and not harmless


def _is_place(key: str) -> bool:
    """Tells whether a key says where something is, and not what it does."""
    *above, owner, word = ["", "", *key.split(".")]
    return word in _PLACES and owner in _PLACED and above[-1] not in _NAMED


def _below(key: str, above: Sequence[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in above)


def _outside_lists(key: str) -> str:
    """Cuts a key before the first place in a list."""
    words = key.split(".")
    return ".".join(words[: next((at for at, word in enumerate(words) if word.isdigit()), len(words))])


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Lists the values of a configuration that hold no others, by their keys."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    values: dict[str, Any] = {}
    for name, part in parts:
        values |= leaves(part, f"{path}.{name}" if path else str(name))
    return values or {path: value}
