"""The model card: what was trained from what.

Only what is known to be harmless is printed: numbers, names of shipped classes, and a few words of fixed meaning. A
configuration may hold keys, addresses and folders of the machine anywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

SHOWN = {
    "seed_everything": True,
    "trainer": {"max_steps", "accumulate_grad_batches", "precision", "gradient_clip_val"},
    "model": {"student", "objective", "teachers", "rollout", "optimizer", "schedule", "on_nonfinite"},
}
WORDS = {"dtype", "name", "normalizer", "on_nonfinite", "precision", "quantization", "source", "support", "teacher"}
"""Keys whose values may be text."""
PLAIN = {"None", "True", "False", "nothing"}


def model_card(config: dict[str, Any], steps: int, library: str, changes: Sequence[dict[str, Any]] = ()) -> str:
    """What was trained from what, with the settings that may be shown.

    Args:
        config: of the run.
        steps: optimizer steps that were done.
        library: that loads the student.
        changes: what resumed runs did otherwise than before, as in a checkpoint.
    """
    model = config["model"]["init_args"]
    base, rollout = known_as(model["student"]["path"]), model.get("rollout") or {}
    teachers = model.get("teachers") or {}
    lines = [_term(term, teachers) for term in model["objective"]["terms"]]
    lines += [_teacher(name, teacher) for name, teacher in teachers.items()]
    acts = ", ".join(f"{name} {share:g}" for name, share in (rollout.get("behavior") or {"student": 1}).items())
    lines.append(f"* who acts: {acts}; horizon {rollout.get('horizon', 'as by default')}")
    head = yaml.safe_dump({"library_name": library, "tags": ["on-policy-distillation"], "base_model": base})
    shown = yaml.safe_dump(public(config), sort_keys=False, allow_unicode=True)
    return (
        f"---\n{head}---\n\n# Student of an on-policy distillation\n\n"
        f"Trained with opd-lightning for {steps} optimizer steps from `{base}`.\n\n"
        "## Objective\n\n" + "\n".join(lines) + "\n\n"
        "## Configuration\n\nWithout data, texts and paths; the run's own `config.yaml` has all of it.\n\n"
        f"```yaml\n{shown}```\n{_changed(changes)}"
    )


def known_as(path: str) -> str:
    """What others may know a model by: its name on the hub, or of its folder without where that is."""
    plain = path.replace("\\", "/")
    local = plain.startswith((".", "/", "~")) or plain.count("/") > 1 or ":/" in plain or Path(path).exists()
    return path if path.startswith("opd:") or not local else plain.rstrip("/").rpartition("/")[2]


def public(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that may be shown."""
    trainer = config.get("trainer") or {}
    model = config["model"]
    arguments = {name: value for name, value in model["init_args"].items() if name in SHOWN["model"]}  # type: ignore[operator]
    return {
        "seed_everything": config.get("seed_everything"),
        "trainer": _harmless({name: value for name, value in trainer.items() if name in SHOWN["trainer"]}),  # type: ignore[operator]
        "model": {"class_path": _name(model), "init_args": _harmless(arguments)},
    }


def _harmless(value: Any, key: str = "") -> Any:
    """The same without what may not be shown; None where nothing is left of it."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if key in WORDS else _number(value)
    if isinstance(value, list):
        return [found for found in (_harmless(item, key) for item in value) if found is not None] or None
    if not isinstance(value, dict):
        return None
    if "class_path" in value:
        foreign = not value["class_path"].startswith(("opd_lightning.", "torch.optim."))
        inside = None if foreign else _harmless(value.get("init_args") or {})
        return {"class_path": _name(value)} | ({"init_args": inside} if inside else {})
    found = {name: _harmless(item, name) for name, item in value.items()}
    return {name: item for name, item in found.items() if item is not None} or None


def _number(text: str) -> float | None:
    """YAML reads 1e-5 as text."""
    try:
        return float(text)
    except ValueError:
        return None


def _name(described: Any) -> str:
    """The class that a part of a configuration names, without its module."""
    return str(described["class_path"]).rpartition(".")[2]


def _changed(history: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"* after optimizer step {entry['step']}: `{key}` {new} (was {old})\n"
        for entry in history
        for key, old, new in entry["keys"]
        if _is_shown(key.split("."), old, new)
    ]
    return "\n## Changed on the way\n\n" + "".join(lines) if lines else ""


def _is_shown(path: list[str], *values: str) -> bool:
    place = path[2:3] if path[:2] == ["model", "init_args"] else path[1:2]
    known: Any = SHOWN.get(path[0])
    plain = all(path[-1] in WORDS or value in PLAIN or _number(value) is not None for value in values)
    return plain and (known is True or (bool(known) and bool(place) and place[0] in known))


def _term(term: dict[str, Any], teachers: dict[str, Any]) -> str:
    weights = "".join(f" × {_name(weight)}" for weight in term.get("weights") or ())
    teacher = term.get("teacher", "teacher")
    to = f" to `{teacher}`" if teacher in teachers else ""
    return f"* {float(term.get('coefficient', 1)):g} × {_name(term['signal'])}{to}{weights}"


def _teacher(name: str, teacher: dict[str, Any]) -> str:
    weights = teacher["weights"]
    pretrained = (weights.get("init_args") or {}).get("pretrained") or {}
    base = f", {known_as(pretrained['path'])}" if "path" in pretrained else ""
    view = f", with a {_name(teacher['view'])}" if teacher.get("view") else ""
    return f"* teacher `{name}`: {_name(weights)}{base}{view}"
