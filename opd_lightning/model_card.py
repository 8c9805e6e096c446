"""The model card: what was measured of a student, its base, objective and settings.

Only what is known to be harmless is printed: numbers, names of shipped classes, and a few words of fixed meaning. A
configuration may hold keys, addresses and folders of the machine anywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from .statement import Statement

SHOWN = {
    "seed_everything": True,
    "trainer": {"max_steps", "accumulate_grad_batches", "precision", "gradient_clip_val"},
    "model": {"student", "objective", "teachers", "rollout", "optimizer", "schedule", "on_nonfinite"},
}
WORDS = {"dtype", "name", "normalizer", "on_nonfinite", "precision", "quantization", "source", "support", "teacher"}
"""Keys whose values may be text."""
PLAIN = {"None", "True", "False", "nothing"}


def model_card(
    config: dict[str, Any],
    statement: Statement,
    library: str,
    task: str,
    changes: Sequence[dict[str, Any]] = (),
) -> str:
    """Writes the model card, with the settings that may be published.

    Args:
        config: of the run.
        statement: what was measured of the student.
        library: that loads the student.
        task: the hub's word for what it does.
        changes: settings that resumed runs changed, as in a checkpoint.
    """
    model = config["model"]["init_args"]
    base, rollout = known_as(model["student"]["path"]), model.get("rollout") or {}
    teachers = model.get("teachers") or {}
    lines = [_term(term, teachers) for term in model["objective"]["terms"]]
    lines += [_teacher(name, teacher) for name, teacher in teachers.items()]
    acts = ", ".join(f"{name} {share:g}" for name, share in (rollout.get("behavior") or {"student": 1}).items())
    lines.append(f"* who acts: {acts}; horizon {rollout.get('horizon', 'as by default')}")
    results: Any = statement.results(task)
    head = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        tags=["on-policy-distillation"],
        base_model=base,
        **({"model_name": f"student of {base}", "eval_results": results} if results else {}),
    )
    settings = yaml.safe_dump(public(config), sort_keys=False, allow_unicode=True)
    return (
        f"---\n{head.to_yaml()}\n---\n\n# Student of an on-policy distillation\n\n"
        f"Trained with opd-lightning for {statement.steps} optimizer steps from `{base}`.\n\n{statement.markdown()}\n"
        "## Objective\n\n" + "\n".join(lines) + "\n\n"
        "## Configuration\n\nWithout data, texts and paths; the run's own `config.yaml` has all of it.\n\n"
        f"```yaml\n{settings}```\n{_changed(changes)}"
    )


def known_as(path: str) -> str:
    """Names a model for others: by its name on the hub, or by that of its folder, without the path."""
    plain = path.replace("\\", "/")
    local = plain.startswith((".", "/", "~")) or plain.count("/") > 1 or ":/" in plain or Path(path).exists()
    return path if path.startswith("opd:") or not local else plain.rstrip("/").rpartition("/")[2]


def public(config: dict[str, Any]) -> dict[str, Any]:
    """Selects the part of a configuration that may be published."""
    trainer = config.get("trainer") or {}
    model = config["model"]
    arguments = {name: value for name, value in model["init_args"].items() if name in SHOWN["model"]}  # type: ignore[operator]
    return {
        "seed_everything": config.get("seed_everything"),
        "trainer": _harmless({name: value for name, value in trainer.items() if name in SHOWN["trainer"]}),  # type: ignore[operator]
        "model": {"class_path": _name(model), "init_args": _harmless(arguments)},
    }


def _harmless(value: Any, key: str = "") -> Any:
    """Drops values that may not be published; None where nothing is left."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return value if key in WORDS else _number(value)
    if isinstance(value, list):
        return [published for published in (_harmless(item, key) for item in value) if published is not None] or None
    if not isinstance(value, dict):
        return None
    if "class_path" in value:
        foreign = not value["class_path"].startswith(("opd_lightning.", "torch.optim."))
        inside = None if foreign else _harmless(value.get("init_args") or {})
        return {"class_path": _name(value)} | ({"init_args": inside} if inside else {})
    published = {name: _harmless(item, name) for name, item in value.items()}
    return {name: item for name, item in published.items() if item is not None} or None


def _number(text: str) -> float | None:
    """Reads a number that YAML took for text, such as 1e-5; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _name(described: Any) -> str:
    """Returns the class that a part of a configuration names, without its module."""
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
    section = path[2:3] if path[:2] == ["model", "init_args"] else path[1:2]
    published: Any = SHOWN.get(path[0])
    plain = all(path[-1] in WORDS or value in PLAIN or _number(value) is not None for value in values)
    return plain and (published is True or (bool(published) and bool(section) and section[0] in published))


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
